"""Sums over ranks, emulated on what every rank of a problem sends."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from polyaccel_conformance.formats import FORMATS
from polyaccel_conformance.problem import Problem
from polyaccel_conformance.problems.collectives import CollectiveProblem
from tests.conformance.drawn import Emulation
from tests.conformance.emulation import f32, rounding, significand

Floats = npt.NDArray[np.float64]
Round = Callable[[npt.ArrayLike], Floats]
Order = Callable[[Sequence[Floats], Round], Floats]


def chain(parts: Sequence[Floats], to: Round) -> Floats:
    """One rank after the other."""
    total = parts[0]
    for part in parts[1:]:
        total = to(total + part)
    return total


def backwards(parts: Sequence[Floats], to: Round) -> Floats:
    return chain(parts[::-1], to)


def ring(parts: Sequence[Floats], to: Round) -> Floats:
    """Chunk i of the columns begins at rank i."""
    found = np.empty_like(parts[0])
    for i in range(len(parts)):
        chunk = (..., slice(i, None, len(parts)))
        found[chunk] = chain([part[chunk] for part in (*parts[i:], *parts[:i])], to)
    return found


def tree(parts: Sequence[Floats], to: Round) -> Floats:
    """Neighbours first."""
    level = list(parts)
    while len(level) > 1:
        pairs = [to(a + b) for a, b in zip(level[0::2], level[1::2], strict=False)]
        level = pairs + level[2 * len(pairs) :]
    return level[0]


class Reduction:
    """``how`` the ranks' parts are added; ``to``: the rounding of partial sums, by default to the parts' own dtype."""

    def __init__(self, how: Order, to: Round | None = None) -> None:
        self.how, self.to = how, to

    def __call__(self, problem: Problem) -> Mapping[str, Floats]:
        assert isinstance(problem, CollectiveProblem)
        own = rounding(FORMATS[problem.case.dtype])
        total = self.how(problem.parts, own if self.to is None else self.to)
        if problem.case.operator == "reduce_scatter":
            total = total[: problem.case.dim("rows")]
        return {"y": total, "x": total}


REDUCTIONS: Mapping[str, Emulation] = {
    "one rank after the other": Reduction(chain),
    "backwards": Reduction(backwards),
    "ring": Reduction(ring),
    "tree": Reduction(tree),
    "ring in float32": Reduction(ring, f32),
    "tree in float32": Reduction(tree, f32),
}


def four_bits(x: npt.ArrayLike) -> Floats:
    """As float8 e4m3 would keep, exponents unlimited."""
    return significand(x, 4)
