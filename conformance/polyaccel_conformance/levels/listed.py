"""The cases that the required tables ask for by name: for each cell that no other case covers, the plainest one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from polyaccel.backend.levels import Span, Value
from polyaccel_conformance.case import Case, Choice
from polyaccel_conformance.levels.cell import Cell, index
from polyaccel_conformance.levels.coverage import covered
from polyaccel_conformance.levels.evidence import required
from polyaccel_conformance.problem import ProblemSet


def listed_cases(problem_set: ProblemSet, have: Iterable[Case], *, ranks: int = 1, seed: int = 0) -> tuple[Case, ...]:
    """Cases that fill the required cells of an operator which none of ``have`` lies in.

    Deterministic. A case is the plainest one with the cell's value; one case may fill several cells. Cells that the
    operator's axes cannot express are left empty: a level will say so.
    """
    wanted = [cell for cell in required(ranks) if cell.operator == problem_set.operator]
    table = index(wanted)
    open_cells = dict.fromkeys(cell for cell in wanted if not (cell.needs and ranks < 2))
    for case in have:
        for cell in covered(case, table):
            open_cells.pop(cell, None)
    found: list[Case] = []
    for cell in tuple(open_cells):
        if cell not in open_cells:
            continue
        for axes in _attempts(problem_set, cell, open_cells):
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


def _attempts(problem_set: ProblemSet, cell: Cell, _open: Iterable[Cell]) -> Iterator[dict[str, Choice]]:
    axes = problem_set.axes()
    plain: dict[str, Choice] = {path: values[0] for path, values in axes.items() if values}
    if cell.dtype:
        plain["dtype"] = cell.dtype
    for name, value in cell.where:
        plain |= _set(name, value)
    for value in _representatives(cell.value):
        yield {**plain, **_set(cell.axis, value)} if cell.axis else dict(plain)


def _representatives(value: Value | Span) -> Iterator[Value]:
    if isinstance(value, Span):
        yield value.high
        if value.low != value.high:
            yield value.low
    else:
        yield value


def _set(axis: str, value: Value) -> dict[str, Choice]:
    """Axes that make a case have a fact or a value."""
    return {axis: value} if not axis.startswith("facts.") else {}
