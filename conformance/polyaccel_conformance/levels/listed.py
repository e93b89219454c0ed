"""The cases that the required tables ask for by name: for each cell that no other case covers, the plainest one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from polyaccel.backend.levels import DEVICES, Span, Value
from polyaccel_conformance.case import Case, Choice
from polyaccel_conformance.levels.cell import Cell, index
from polyaccel_conformance.levels.coverage import covered
from polyaccel_conformance.levels.evidence import required
from polyaccel_conformance.levels.facts import Axes, axes_of_fact
from polyaccel_conformance.problem import ProblemSet

SIZE = 7
"""Of the dimensions that a cell does not ask for: no tile divides it, and a large neighbour keeps the case small."""


def listed_cases(problem_set: ProblemSet, have: Iterable[Case], *, ranks: int = 1, seed: int = 0) -> tuple[Case, ...]:
    """Cases that fill the required cells of an operator which none of ``have`` lies in.

    Deterministic. A case is a plain one with the cell's value; one case may fill several cells. Cells that the
    operator's axes cannot express are left empty: a level will say so. ``ranks``: above 1 for a set of that world size,
    which fills the cells that need several devices and no others.
    """
    wanted = [
        cell
        for cell in required(ranks)
        if cell.operator == problem_set.operator and (cell.needs == DEVICES) is (ranks > 1)
    ]
    table = index(wanted)
    open_cells = dict.fromkeys(wanted)
    for case in have:
        for cell in covered(case, table):
            open_cells.pop(cell, None)
    found: list[Case] = []
    for cell in wanted:
        if cell not in open_cells:
            continue
        for axes in _attempts(problem_set, cell, len(found)):
            mended = problem_set.mend(axes)
            if mended is None:
                continue
            case = Case.of(problem_set.operator, mended, seed=seed + len(found))
            filled = set(covered(case, table))
            if cell in filled:
                found.append(case)
                for other in filled:
                    open_cells.pop(other, None)
                break
    return tuple(found)


def _attempts(problem_set: ProblemSet, cell: Cell, number: int) -> Iterator[dict[str, Choice]]:
    axes = problem_set.axes()
    plain: dict[str, Choice] = {path: values[0] for path, values in axes.items() if values}
    # Simple data see simple bugs only: the cases take turns through the kinds.
    kinds = axes.get("data", ())
    if kinds:
        plain["data"] = kinds[number % len(kinds)]
    if cell.dtype:
        plain["dtype"] = cell.dtype
    sized = {path: SIZE for path, values in axes.items() if path.startswith("dims.") and SIZE in values}
    for base in ({**plain, **sized}, plain):
        for value in _representatives(cell.value):
            wanted = [*cell.where, *([(cell.axis, value)] if cell.axis else [])]
            changes = [_axes(axes, name, item) for name, item in wanted]
            if None not in changes:
                yield {**base, **{path: item for change in changes if change for path, item in change.items()}}


def _axes(axes: Axes, name: str, value: Value) -> dict[str, Choice] | None:
    if name.startswith("facts."):
        return axes_of_fact(axes, name, value)
    # A size may be any integer; everything else is one of the listed values, and an axis that is not listed is none.
    if name not in axes or (name == "ranks" and value not in axes[name]):
        return None
    return {name: value}


def _representatives(value: Value | Span) -> Iterator[Value]:
    if isinstance(value, Span):
        yield value.high
        if value.low != value.high:
            yield value.low
    else:
        yield value
