"""Cases of ``silu_and_mul`` and ``gelu``.

Exact rows (``saturated``) hold arguments at which the activation is its argument or zero, bit by bit: sigmoid, erf and
tanh are so close to their limits there that every implementation returns these, and a division by one is exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Case, Choice
from polyaccel_conformance.formats import format_of
from polyaccel_conformance.operand import Operand
from polyaccel_conformance.oracle.activation import gelu, silu_and_mul
from polyaccel_conformance.oracle.bounded import Expected, finish
from polyaccel_conformance.problem import Exactly, Prepared, Problem, ProblemSet
from polyaccel_conformance.problems.rows import RANDOM_KINDS, SIZES, TOKENS, coarsest, draw, poison_row, settled
from polyaccel_conformance.problems.weights import tensor_of
from polyaccel_conformance.words import Source

Floats = npt.NDArray[np.float64]

EXACT = "saturated"


class ActivationProblem(Problem):
    """``x: [tokens, width * n]`` and an output ``y: [tokens, n]``."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.format = format_of(case.dtype)
        self.exact = case.data == EXACT

    def prepare(self, bench: Bench) -> Prepared:
        case = self.case
        return Prepared(
            arguments=dict(case.attributes),
            collect=lambda result, _: {"y": tensor_of(result)},
            static={"dtype": case.dtype, "n": case.dim("n"), "world_size": 1, **case.attributes},
            ranges={"tokens": (case.dim("tokens"), max(case.dim("tokens"), 1))},
        )

    @property
    def x(self) -> Floats:
        return self.operands["x"].values.astype(np.float64)


class SiluAndMulProblem(ActivationProblem):
    """``silu(x[:, :n]) * x[:, n:]``."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        source, shape = self.source, (case.dim("tokens"), case.dim("n"))
        if self.exact:
            gate = saturated(source, shape, lowest=20)
            up = source.integers("up", shape, -255, 255).astype(np.float64)
            # A tie would be decided by the last place of the division.
            up = np.where(settled(gate * up, self.format), up, 2.0)
        else:
            gate, up = draw(source, "gate", shape, case.data), draw(source, "up", shape, case.data)
            if case.data == "overflow":
                gate[:, ::2] = np.abs(gate[:, ::2]) * 3 + 1
                up[:, ::2] = np.sign(up[:, ::2]) * self.format.max * (0.1 + np.abs(up[:, ::2]) / 6)
        x = np.concatenate((gate, up), axis=-1)
        self.operands = {"x": Operand.rounded(poison_row(source, x) if case.data == "nonfinite" else x, case.dtype)}

    def expected(self) -> Mapping[str, Expected | Exactly]:
        ulps = self.spec.numerics.ulps
        kept = coarsest(self.spec, "silu", self.case.dtype)
        with np.errstate(invalid="ignore", over="ignore"):
            y = silu_and_mul(self.x, kept=kept, exp_ulps=ulps["exp"], divide_ulps=ulps["divide"])
            return {"y": finish(y, self.format, exact=bool(self.exact))}


class GeluProblem(ActivationProblem):
    """GELU by erf or by tanh."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        shape = (case.dim("tokens"), case.dim("n"))
        x = saturated(self.source, shape, lowest=16) if self.exact else draw(self.source, "x", shape, case.data)
        if case.data == "nonfinite":
            x = poison_row(self.source, x)
        elif case.data == "infinite" and x.size:
            # Minus infinity has no defined result: it is a product with zero.
            x[:, -1] = np.inf
        self.operands = {"x": Operand.rounded(x, case.dtype)}

    def expected(self) -> Mapping[str, Expected | Exactly]:
        ulps = self.spec.numerics.ulps
        approximate: Literal["none", "tanh"] = "tanh" if self.case.attributes["approximate"] == "tanh" else "none"
        with np.errstate(invalid="ignore", over="ignore"):
            y = gelu(self.x, approximate, erf_ulps=ulps["erf"], tanh_ulps=ulps["tanh"])
            return {"y": finish(y, self.format, exact=bool(self.exact))}


class _ActivationProblems(ProblemSet):
    def ranges(self) -> Mapping[str, tuple[int, int]]:
        return {"dims.tokens": (0, 40), "dims.n": (1, 300)}


class SiluAndMulProblems(_ActivationProblems):
    """Gate and up halves of any width."""

    operator = "silu_and_mul"

    def axes(self) -> Mapping[str, Sequence[Choice]]:
        return {
            "dtype": ("float32", "bfloat16", "float16"),
            "dims.tokens": TOKENS,
            "dims.n": SIZES,
            "layouts.x": ("contiguous", "row_padded", "offset"),
            "data": ("normal", EXACT, *RANDOM_KINDS[1:], "overflow"),
            "device": ("current", "other"),
            "stream": ("default", "side"),
        }

    def problem(self, case: Case) -> Problem:
        return SiluAndMulProblem(case)


class GeluProblems(_ActivationProblems):
    """Both forms."""

    operator = "gelu"

    def axes(self) -> Mapping[str, Sequence[Choice]]:
        return {
            "dtype": ("float32", "bfloat16", "float16"),
            "dims.tokens": TOKENS,
            "dims.n": SIZES,
            "attributes.approximate": ("none", "tanh"),
            "layouts.x": ("contiguous", "row_padded", "offset"),
            "data": ("normal", EXACT, *RANDOM_KINDS[1:], "infinite"),
            "device": ("current", "other"),
            "stream": ("default", "side"),
        }

    def problem(self, case: Case) -> Problem:
        return GeluProblem(case)


def saturated(source: Source, shape: tuple[int, ...], lowest: int) -> Floats:
    """Integers from ``lowest`` to 127, zeros and -128: an activation leaves them as they are, or makes them zero."""
    values = source.integers("saturated", shape, lowest, 127).astype(np.float64)
    kind = source.integers("kind", shape, 0, 9)
    return np.where(kind == 0, 0.0, np.where(kind <= 2, -128.0, values))
