"""What a report says, worked out once for all of its forms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyaccel_conformance.levels.grant import LevelResult, Verdict
from polyaccel_conformance.multi.identity import RankIdentity
from polyaccel_conformance.results import CellCount, CheckState, OperatorState, RunResult, encode
from polyaccel_conformance.tally import NO_CASE
from polyaccel_conformance.waivers import Applied, Waiver

NO_WAIVERS = Applied(covered=frozenset(), problems=())
HEADROOM = "The worst error of random data as a share of what the oracle allows; above 1 is wrong."
APART = "Cases that differ from the contract in what was never promised. They count neither as passed nor as failed."


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A run and what follows from it.

    Attributes:
        result: the run.
        levels: every level's verdict; empty for a table, which earns an operator report and never a level.
        waivers: as read, and ``applied`` what they did; ``unwaived``: failures that are left, by operator.
        identities: who the ranks of each world were.
    """

    result: RunResult
    levels: tuple[LevelResult, ...] = ()
    waivers: tuple[Waiver, ...] = ()
    applied: Applied = NO_WAIVERS
    unwaived: tuple[tuple[str, int], ...] = ()
    identities: tuple[RankIdentity, ...] = ()

    def is_waived(self, operator: str) -> bool:
        """Whether waivers cover every failure of an operator."""
        return dict(self.unwaived).get(operator, 0) == 0

    @property
    def subject(self) -> str:
        subject = self.result.header.subject
        # Where the file lies is nobody's business but the machine's.
        return subject.name if subject.kind == "backend" else f"{Path(subject.path).name}:{subject.name}"

    @property
    def title(self) -> str:
        kind = "Conformance report" if self.result.header.subject.kind == "backend" else "Operator report"
        return f"{kind}: {self.subject}"

    @property
    def verdict(self) -> str:
        """One line: what was earned, or why nothing was."""
        if self.result.device_lost:
            return f"device lost: {self.result.device_lost}"
        wrong = sum(state.failed for state in self.result.operators)
        if self.result.header.subject.kind != "backend":
            failing = f"{wrong} failing cases" if wrong else "no failing case"
            apart = sum(state.not_promised for state in self.result.operators)
            return f"{failing}; {apart} more differ in what was never promised" if apart else failing
        names = [level.name for level in self.levels if level.earned]
        earned = f"earned {'; '.join(names)}" if names else "earned no level"
        return earned + (f"; {wrong} failing cases" if wrong else "")

    @property
    def not_exercised(self) -> tuple[str, ...]:
        """Everything that did not happen, with the reason: levels, operators, checks, single cells."""
        lines = [
            f"level {level.level.name} {level.level.title}: {'; '.join(level.reasons)}"
            for level in self.levels
            if level.verdict in (Verdict.NOT_EXERCISED, Verdict.NOT_CLAIMED)
        ]
        lines += [
            f"operator {state.operator}: {state.reason or 'no case'}"
            for state in self.result.operators
            if state.verdict == "not exercised" and state.operator not in self.result.header.out_of_scope
        ]
        if self.result.header.out_of_scope:
            lines.append(f"not in the table: {', '.join(self.result.header.out_of_scope)}")
        lines += [
            f"check {state.check}: {state.reason or state.control or 'no case'}"
            for state in self.result.checks
            if state.verdict in ("not exercised", "inconclusive") and not is_idle(state)
        ]
        idle = [state.check for state in self.result.checks if is_idle(state)]
        if idle:
            lines.append(f"checks that no case asks: {', '.join(idle)}")
        lines += [f"{level.level.name}: {name}" for level in self.levels for name in level.not_exercised]
        return tuple(dict.fromkeys(lines))

    @property
    def has_promises(self) -> bool:
        """Whether the subject says what it never promised."""
        return bool(self.result.header.not_promised)

    def to_json(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "verdict": self.verdict,
            "levels": [level.to_json() for level in self.levels],
            "waivers": [waiver.to_json() for waiver in self.waivers],
            "waiver_problems": list(self.applied.problems),
            "not_exercised": list(self.not_exercised),
            "ranks": encode(self.identities),
            "result": encode(self.result),
        }


def is_idle(state: CheckState) -> bool:
    """Whether a check has nothing to say because no case asked it."""
    return state.verdict == "not exercised" and not state.cases and state.reason == NO_CASE


def runs_as(state: OperatorState) -> str:
    """``native 3, composite 1``: by how many cases ran as what."""
    return ", ".join(f"{kind or 'not planned'} {count}" for kind, count in state.kinds.items())


def why(state: CheckState) -> str:
    """What a check's verdict rests on."""
    if state.verdict == "failed":
        return f"{state.failures} of {state.cases} cases"
    return state.reason or (f"control {state.control}" if state.control else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Square:
    """One square of the coverage grid: ``cases``, those ``failed``, ``not_promised`` and ``composite``, and the worst
    err / tol."""

    cases: int = 0
    failed: int = 0
    not_promised: int = 0
    composite: int = 0
    headroom: float = 0.0

    @property
    def state(self) -> str:
        if not self.cases:
            return "empty"
        if self.failed:
            return "failed"
        if self.not_promised:
            return "apart"
        return "composite" if self.composite == self.cases else "mixed" if self.composite else "native"

    def plus(self, count: CellCount) -> Square:
        return Square(
            cases=self.cases + count.cases,
            failed=self.failed + count.failed,
            not_promised=self.not_promised + count.not_promised,
            composite=self.composite + count.kinds.get("composite", 0),
            headroom=max(self.headroom, count.headroom),
        )


Grid = Mapping[str, Mapping[str, Square]]
"""Rows (``k 2..15``, ``x offset``) by column (dtype)."""


def grids(counts: Sequence[CellCount]) -> dict[str, dict[str, dict[str, Square]]]:
    """A grid for each operator: a row for each range of each size and each layout of each argument, a column a dtype.

    A case counts once in each row that it lies in.
    """
    sizes: dict[tuple[str, str], set[str]] = {}
    layouts: dict[tuple[str, str], set[str]] = {}
    found: dict[str, dict[str, dict[str, Square]]] = {}
    for count in counts:
        cell = count.cell
        # The table crosses layouts with ranges: along one of them, one kind of the other counts every case once.
        first_layout = _first(layouts, (cell.operator, cell.dtype), cell.layout)
        first_size = _first(sizes, (cell.operator, cell.dtype), cell.range)
        rows = found.setdefault(cell.operator, {})
        if cell.range != "-" and first_layout:
            _add(rows, cell.range.replace("=", " "), count)
        if cell.layout != "-" and first_size:
            _add(rows, cell.layout.replace("=", " "), count)
        if cell.range == "-" and cell.layout == "-":
            _add(rows, "all", count)
    return {operator: dict(sorted(rows.items(), key=lambda row: _order(row[0]))) for operator, rows in found.items()}


def _order(row: str) -> tuple[bool, str, int, str]:
    """Sizes before layouts, each by name, ranges from small to large."""
    name, _, value = row.partition(" ")
    low = value.partition("..")[0]
    return (not low.isdigit(), name, int(low) if low.isdigit() else 0, value)


def _first(seen: dict[tuple[str, str], set[str]], key: tuple[str, str], name: str) -> bool:
    """Whether ``name`` belongs to the argument or size that was met first under this key."""
    kind = name.partition("=")[0]
    known = seen.setdefault(key, {kind})
    return kind in known


def _add(rows: dict[str, dict[str, Square]], row: str, count: CellCount) -> None:
    columns = rows.setdefault(row, {})
    columns[count.cell.dtype] = columns.get(count.cell.dtype, Square()).plus(count)


def dtypes(grid: Grid) -> tuple[str, ...]:
    """The columns of a grid: float32 first."""
    names = {name for columns in grid.values() for name in columns}
    return tuple(sorted(names, key=lambda name: (name != "float32", name)))
