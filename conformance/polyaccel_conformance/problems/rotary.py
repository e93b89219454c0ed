"""Cases of ``rotary_embedding``.

Exact ones (``permutation``, ``integers``) have cos and sin of 0 and +-1: signed permutations, or sums of two integers
that are rounded once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from polyaccel.backend import DeviceState, RopeTable, TokenClass
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Case, Choice
from polyaccel_conformance.formats import format_of
from polyaccel_conformance.operand import Operand
from polyaccel_conformance.oracle.bounded import Expected, finish
from polyaccel_conformance.oracle.rotary import rotate
from polyaccel_conformance.problem import Exactly, Prepared, Problem, ProblemSet
from polyaccel_conformance.problems.apart import token
from polyaccel_conformance.problems.rows import TOKENS, draw, poison_row
from polyaccel_conformance.problems.steps import build_step
from polyaccel_conformance.problems.weights import tensor_of

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

EXACT_KINDS = ("permutation", "integers")
POSITIONS = ("sequential", "permuted", "repeated", "last")


class RotaryProblem(Problem):
    """q and k turned by the angles of their tokens' positions."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        source, tokens = self.source, case.dim("tokens")
        self.exact = case.data in EXACT_KINDS
        self.positions, count = self._positions(tokens)
        width = case.dim("rotary_dim") // 2
        self.cos, self.sin = (Operand.rounded(table, "float32") for table in self._tables((count, width)))
        self.operands = {}
        for name, heads in (("q", case.dim("heads")), ("k", case.dim("kv_heads"))):
            shape = (tokens, heads, case.dim("head_dim"))
            limit = 2 ** min(format_of(case.dtype).bits, 12) - 1
            x = (
                source.integers(name, shape, -limit, limit).astype(np.float64)
                if self.exact
                else draw(source, name, shape, case.data)
            )
            self.operands[name] = Operand.rounded(poison_row(source, x) if case.data == "nonfinite" else x, case.dtype)

    @property
    def style(self) -> Literal["half", "interleaved"]:
        return "interleaved" if self.case.attributes["style"] == "interleaved" else "half"

    @property
    def apart(self) -> Sequence[int]:
        return range(len(self.positions))

    def alone(self, row: int) -> Problem:
        other = token(self, row)
        other.positions = self.positions[row : row + 1]
        return other

    def _positions(self, tokens: int) -> tuple[Ints, int]:
        """Of the tokens, and how many the tables have."""
        pattern, source = self.case.structure["positions"], self.source
        count = tokens + 5
        if pattern == "sequential":
            return np.arange(tokens, dtype=np.int64) + 2, count
        if pattern == "permuted":
            return source.permutation("positions", count)[:tokens], count
        if pattern == "repeated":
            return source.integers("positions", (tokens,), 0, max(tokens // 3, 1)), count
        return np.full(tokens, count - 1, dtype=np.int64), count

    def _tables(self, shape: tuple[int, int]) -> tuple[Floats, Floats]:
        source, kind = self.source, self.case.data
        if kind == "permutation":
            quarter = source.integers("quarter", shape, 0, 3)
            return np.array([1.0, 0.0, -1.0, 0.0])[quarter], np.array([0.0, 1.0, 0.0, -1.0])[quarter]
        if kind == "integers":
            cos, sin = (source.integers(name, shape, -1, 1).astype(np.float64) for name in ("cos", "sin"))
            return cos, sin
        # Rational points of the unit circle, so that no libm is needed.
        t = 2 * source.uniform("angle", shape) - 1
        return (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)

    def prepare(self, bench: Bench) -> Prepared:
        case, tokens = self.case, self.case.dim("tokens")
        decode = bool(case.structure["decode"])
        queries = [1] * tokens if decode else [tokens]
        step = build_step(self.source, queries, positions=self.positions, decode=decode)
        rope = RopeTable(
            cos=bench.upload(self.cos.torch()),
            sin=bench.upload(self.sin.torch()),
            rotary_dim=case.dim("rotary_dim"),
            style=self.style,
        )

        def collect(result: object, _: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
            if not isinstance(result, tuple):
                raise TypeError(f"expected (q, k), got {type(result).__name__}")
            return {name: tensor_of(part) for name, part in zip(("q", "k"), result, strict=True)}

        return Prepared(
            arguments={"rope": rope, "step": bench.begin_step(step, DeviceState())},
            collect=collect,
            static={
                "dtype": case.dtype,
                "heads": case.dim("heads"),
                "kv_heads": case.dim("kv_heads"),
                "head_dim": case.dim("head_dim"),
                "rotary_dim": case.dim("rotary_dim"),
                "style": self.style,
                "world_size": 1,
            },
            ranges={"tokens": (tokens, max(tokens, 1))},
            token_class=TokenClass.DECODE if decode else TokenClass.MIXED,
            again=lambda: {"step": bench.begin_step(step, DeviceState())},
        )

    def expected(self) -> Mapping[str, Expected | Exactly]:
        cos = self.cos.values.astype(np.float64)[self.positions]
        sin = self.sin.values.astype(np.float64)[self.positions]
        out = format_of(self.case.dtype)
        with np.errstate(invalid="ignore", over="ignore"):
            return {
                name: finish(rotate(x.values.astype(np.float64), cos, sin, self.style), out, exact=bool(self.exact))
                for name, x in self.operands.items()
            }

    def digests(self) -> dict[str, str]:
        positions = Operand(self.positions, "int64").digest()
        return super().digests() | {"cos": self.cos.digest(), "sin": self.sin.digest(), "positions": positions}


class RotaryProblems(ProblemSet):
    """Both styles, whole and partial heads; table rows in any order."""

    operator = "rotary_embedding"

    def axes(self) -> Mapping[str, Sequence[Choice]]:
        return {
            "dtype": ("float32", "bfloat16", "float16"),
            "dims.tokens": TOKENS,
            "dims.heads": (1, 2, 4, 9),
            "dims.kv_heads": (1, 2, 3),
            "dims.head_dim": (64, 2, 7, 33, 80, 96, 128, 256),
            "dims.rotary_dim": (256, 2, 16, 32, 64),
            "attributes.style": ("half", "interleaved"),
            "layouts.q": ("contiguous", "row_padded", "offset"),
            "layouts.k": ("contiguous", "row_padded", "offset"),
            "structure.positions": POSITIONS,
            "structure.decode": (False, True),
            "data": ("normal", *EXACT_KINDS, "wide", "outliers", "nonfinite"),
            "device": ("current", "other"),
            "stream": ("default", "side"),
        }

    def ranges(self) -> Mapping[str, tuple[int, int]]:
        return {"dims.tokens": (0, 40), "dims.heads": (1, 12), "dims.kv_heads": (1, 8), "dims.head_dim": (2, 256)}

    def mend(self, axes: dict[str, Choice]) -> dict[str, Choice] | None:
        head_dim, rotary_dim = axes["dims.head_dim"], axes["dims.rotary_dim"]
        assert isinstance(head_dim, int)
        assert isinstance(rotary_dim, int)
        rotary_dim = min(rotary_dim, head_dim)
        axes["dims.rotary_dim"] = rotary_dim - rotary_dim % 2
        return axes

    def problem(self, case: Case) -> Problem:
        return RotaryProblem(case)
