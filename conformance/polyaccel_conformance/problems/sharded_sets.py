"""Axes of the cases in :mod:`problems.sharded`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from polyaccel_conformance.case import Case, Choice
from polyaccel_conformance.problem import Problem, ProblemSet
from polyaccel_conformance.problems.collectives import DIGITS, SKEWS
from polyaccel_conformance.problems.sharded import (
    OPERANDS,
    ColumnLinearProblem,
    RowParallelAddNormProblem,
    RowParallelProblem,
    SgmvProblem,
    ShardedProblem,
)
from polyaccel_conformance.problems.shares import RANKS

KINDS = (DIGITS, "normal", "outliers")
TOKENS = (1, 0, 2, 7, 33)
WIDTHS = (8, 1, 2, 17, 64, 129)
PATTERNS = ("none", "one", "gaps", "each", "runs", "last", "mixes", "cleared")
MODULES = ("none", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EVEN = 128
"""Rows and columns of each rank in cases of ``even``: no backend needs to pad them."""


class _ShardedSet(ProblemSet):
    kind: type[ShardedProblem]

    def axes(self) -> Mapping[str, Sequence[Choice]]:
        return {
            "dtype": ("float32", "bfloat16", "float16"),
            "dims.tokens": TOKENS,
            "dims.k": WIDTHS,
            "dims.n": WIDTHS,
            "layouts.x": ("contiguous", "row_padded", "offset"),
            "structure.adapters": PATTERNS,
            "structure.ranks": tuple(RANKS),
            "structure.mix": ("one", "power", "any"),
            "structure.decode": (False, True),
            "data": KINDS,
            "skew": SKEWS,
            **self.further(),
        }

    def further(self) -> Mapping[str, Sequence[Choice]]:
        """Axes of this operator alone."""
        return {}

    def ranges(self) -> Mapping[str, tuple[int, int]]:
        return {"dims.tokens": (0, 40), "dims.k": (1, 140), "dims.n": (1, 140)}

    def mend(self, axes: dict[str, Choice]) -> dict[str, Choice] | None:
        """Every rank holds a column; rows have one adapter at most where results are to be exact."""
        world = _integer(axes.get("ranks", 1))
        axes["dims.k"] = max(_integer(axes["dims.k"]), world)
        if axes["data"] == DIGITS and axes["structure.adapters"] == "mixes":
            axes["structure.adapters"] = "each"
        if axes.get("structure.even"):
            axes["dims.k"] = axes["dims.n"] = EVEN * world
            if axes.get("structure.slices", "one") != "one":
                axes["structure.slices"] = "pair"
        return axes

    def problem(self, case: Case) -> Problem:
        return self.kind(case)


class ColumnLinearProblems(_ShardedSet):
    operator = "column_linear"
    kind = ColumnLinearProblem

    def further(self) -> Mapping[str, Sequence[Choice]]:
        return {
            "structure.slices": ("one", "pair", "qkv", "narrow"),
            "structure.bias": (False, True),
            "structure.even": (False, True),
        }


class SgmvProblems(_ShardedSet):
    operator = "sgmv"
    kind = SgmvProblem

    def further(self) -> Mapping[str, Sequence[Choice]]:
        return {
            "structure.slices": ("one", "pair", "qkv", "narrow"),
            "structure.layer": ("row", "column"),
            "structure.module": MODULES,
            "structure.even": (False, True),
            "layouts.y": ("contiguous", "row_padded", "offset"),
        }

    def mend(self, axes: dict[str, Choice]) -> dict[str, Choice] | None:
        if axes["structure.adapters"] == "none":
            axes["structure.adapters"] = "one"
        return super().mend(axes)


class RowParallelLinearProblems(_ShardedSet):
    operator = "row_parallel_linear"
    kind = RowParallelProblem

    def further(self) -> Mapping[str, Sequence[Choice]]:
        return {
            "attributes.reduce": (True, False),
            "structure.bias": (False, True),
            "structure.even": (False, True),
            "structure.operand": ("none", *(name for name, (a, _) in OPERANDS.items() if a != "residual")),
        }

    def mend(self, axes: dict[str, Choice]) -> dict[str, Choice] | None:
        return super().mend(_with_operand(axes))


class RowParallelAddNormProblems(_ShardedSet):
    operator = "row_parallel_add_norm"
    kind = RowParallelAddNormProblem

    def further(self) -> Mapping[str, Sequence[Choice]]:
        return {
            "attributes.eps": (1e-5, 1e-6, 1e-3),
            "layouts.residual": ("contiguous", "row_padded", "offset"),
            "layouts.norm_weight": ("contiguous", "offset"),
            "structure.bias": (False, True),
            "structure.even": (False, True),
            "structure.operand": ("none", *OPERANDS),
        }

    def mend(self, axes: dict[str, Choice]) -> dict[str, Choice] | None:
        return super().mend(_with_operand(axes))


def _with_operand(axes: dict[str, Choice]) -> dict[str, Choice]:
    """A tensor of one row or column is contiguous however it is laid out. Other strides may bring another kernel with
    other roundings, so that only exact data have the same bits."""
    if axes["structure.operand"] != "none":
        axes["data"], axes["structure.even"] = DIGITS, False
        for name in ("dims.tokens", "dims.n"):
            axes[name] = max(_integer(axes[name]), 2)
        axes["dims.k"] = max(_integer(axes["dims.k"]), 2 * _integer(axes.get("ranks", 1)))
        if axes["structure.operand"] == "bias":
            axes["structure.bias"] = True
    return axes


def _integer(value: Choice) -> int:
    assert isinstance(value, int)
    return value


SHARDED_SETS: tuple[ProblemSet, ...] = (
    ColumnLinearProblems(),
    SgmvProblems(),
    RowParallelLinearProblems(),
    RowParallelAddNormProblems(),
)
