"""Cases of ``select_rows``: a copy, so every bit counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from polyaccel.backend import TokenClass
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Case, Choice
from polyaccel_conformance.formats import format_of
from polyaccel_conformance.operand import Operand
from polyaccel_conformance.oracle.bounded import Bounded, Expected, finish
from polyaccel_conformance.problem import Exactly, Prepared, Problem, ProblemSet
from polyaccel_conformance.problems.rows import SIZES, TOKENS, draw, poison_row
from polyaccel_conformance.problems.steps import build_step
from polyaccel_conformance.problems.weights import tensor_of

SELECTIONS = ("some", "all", "last", "none", "first")


class SelectRowsProblem(Problem):
    """``x[logits_rows]``."""

    exact = True

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        shape = (case.dim("tokens"), case.dim("hidden"))
        x = draw(self.source, "x", shape, "normal")
        self.operands = {
            "x": Operand.rounded(poison_row(self.source, x) if case.data == "nonfinite" else x, case.dtype)
        }
        self.rows = self._rows(case.dim("tokens"))

    def _rows(self, tokens: int) -> npt.NDArray[np.int64]:
        pattern = self.case.structure["rows"]
        every = np.arange(tokens, dtype=np.int64)
        if pattern == "some":
            return every[self.source.uniform("chosen", (tokens,)) < 0.4]
        if pattern == "last":
            return every[-1:]
        if pattern == "first":
            return every[: tokens // 2]
        return every[:0] if pattern == "none" else every

    def prepare(self, bench: Bench) -> Prepared:
        case, tokens = self.case, self.case.dim("tokens")
        decode = bool(case.structure["decode"])
        step = build_step(self.source, [1] * tokens if decode else [tokens], logits_rows=self.rows, decode=decode)
        return Prepared(
            arguments={"step": bench.begin_step(step)},
            collect=lambda result, _: {"rows": tensor_of(result)},
            static={"dtype": case.dtype, "hidden": case.dim("hidden"), "world_size": 1},
            ranges={"tokens": (tokens, max(tokens, 1))},
            token_class=TokenClass.DECODE if decode else TokenClass.MIXED,
            again=lambda: {"step": bench.begin_step(step)},
        )

    def expected(self) -> Mapping[str, Expected | Exactly]:
        values = self.operands["x"].values.astype(np.float64)[self.rows]
        return {"rows": finish(Bounded.exact(values), format_of(self.case.dtype), exact=True)}

    def digests(self) -> dict[str, str]:
        return super().digests() | {"logits_rows": Operand(self.rows, "int64").digest()}


class SelectRowsProblems(ProblemSet):
    """No, some and all rows."""

    operator = "select_rows"

    def axes(self) -> Mapping[str, Sequence[Choice]]:
        return {
            "dtype": ("float32", "bfloat16", "float16"),
            "dims.tokens": TOKENS,
            "dims.hidden": SIZES,
            "layouts.x": ("contiguous", "row_padded", "offset"),
            "structure.rows": SELECTIONS,
            "structure.decode": (False, True),
            "data": ("normal", "nonfinite"),
            "device": ("current", "other"),
            "stream": ("default", "side"),
        }

    def ranges(self) -> Mapping[str, tuple[int, int]]:
        return {"dims.tokens": (0, 64), "dims.hidden": (1, 1100)}

    def mend(self, axes: dict[str, Choice]) -> dict[str, Choice] | None:
        if axes["structure.decode"]:
            axes["structure.rows"] = "all"
        return axes

    def problem(self, case: Case) -> Problem:
        return SelectRowsProblem(case)
