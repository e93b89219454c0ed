"""Small cases of several ranks."""

from __future__ import annotations

from polyaccel_conformance.case import Case, Choice
from polyaccel_conformance.multi.registry import ranked_set


def ranked_case(operator: str, ranks: int, seed: int = 0, **axes: Choice) -> Case:
    """The first value of every axis, changed by ``axes`` with dots written as double underscores, and mended."""
    problems = ranked_set(operator)
    chosen: dict[str, Choice] = {name: values[0] for name, values in problems.axes().items()}
    chosen |= {name.replace("__", "."): value for name, value in axes.items()} | {"ranks": ranks}
    mended = problems.mend(chosen)
    assert mended is not None
    return Case.of(operator, mended, seed)


def reduce_case(ranks: int, **axes: Choice) -> Case:
    """``all_reduce`` of a few rows."""
    return ranked_case("all_reduce", ranks, **{"dims__rows": 3, "dims__width": 5, **axes})
