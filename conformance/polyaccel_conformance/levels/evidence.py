"""Evidence for the levels, counted from the results of single cases."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from polyaccel.backend import STATIONS
from polyaccel.backend.ledger import COMPOSITE_PREFIX
from polyaccel.backend.levels import LEVELS
from polyaccel_conformance.check import RESTRICTION, CaseResult
from polyaccel_conformance.levels.cell import HALVES, Cell, Index, cells, index
from polyaccel_conformance.levels.coverage import beyond, covered
from polyaccel_conformance.levels.grant import Asked, Evidence, Tally
from polyaccel_conformance.multi.identity import RankIdentity
from polyaccel_conformance.results import CheckState
from polyaccel_conformance.tally import IMPOSSIBLE

WAIVED = "waived"


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What the levels must know of where a run took place.

    ``devices``: how many the backend has; ``ranks``: the largest world size that took part; ``graphs``: why graphs
    cannot be captured, empty if they can; ``simulated``: the devices are no hardware; ``identities``: who the ranks of
    each world were.
    """

    devices: int = 1
    ranks: int = 1
    graphs: str = ""
    simulated: bool = False
    identities: tuple[RankIdentity, ...] = ()


def required(ranks: int) -> tuple[Cell, ...]:
    """Every cell of every level, for both 16-bit types."""
    found = (cell for level in LEVELS.values() for half in HALVES for cell in cells(level, half, ranks))
    return tuple(dict.fromkeys(found))


def gather(
    results: Sequence[CaseResult],
    checks: Iterable[CheckState],
    machine: Machine,
    *,
    waived: frozenset[int] = frozenset(),
    complete: bool = True,
) -> Evidence:
    """Count what decides about levels.

    Args:
        results: of every case.
        checks: the verdict on each check.
        machine: where it took place.
        waived: positions in ``results`` of cases whose every failure is covered by a waiver.
        complete: whether every planned case ran.
    """
    native = frozenset(result.case.operator for result in results if _is_native(result))
    composite = frozenset(result.case.operator for result in results if _is_composite(result)) - _stations(native)
    table = index(required(machine.ranks))
    failures: Counter[str] = Counter()
    covers: Counter[str] = Counter()
    asked: dict[str, set[str]] = {}
    tallies: dict[Cell, Tally] = {}
    restrictions: dict[str, dict[str, None]] = {}
    for position, result in enumerate(results):
        operator = result.case.operator
        asked.setdefault(operator, set()).update(result.checks)
        outcome = "passed"
        named = [f.cause.removeprefix(RESTRICTION) for f in result.failures if f.cause.startswith(RESTRICTION)]
        restrictions.setdefault(operator, {}).update(dict.fromkeys(named))
        if len(result.failures) > len(named):
            outcome = WAIVED if position in waived else "failed"
            (covers if outcome == WAIVED else failures)[operator] += 1
        elif result.kind == "composite" and operator in native:
            outcome = "refused"
        _count(tallies, table, result, outcome)
    return Evidence(
        tallies=tallies,
        failures=failures,
        waived=covers,
        restrictions={operator: tuple(names) for operator, names in restrictions.items() if names},
        checks={state.check: Asked(state.verdict) for state in checks if was_asked(state)},
        asked={operator: frozenset(names) for operator, names in asked.items()},
        native=native,
        composite=composite,
        devices=machine.devices,
        ranks=machine.ranks,
        graphs=machine.graphs,
        simulated=machine.simulated,
        identities=machine.identities,
        complete=complete,
    )


def _count(tallies: dict[Cell, Tally], table: Index, result: CaseResult, outcome: str) -> None:
    if outcome == "refused" and beyond(result.case, table):
        return
    name = "passed" if outcome == WAIVED else outcome
    for cell in covered(result.case, table):
        tally = tallies.get(cell, Tally())
        tallies[cell] = replace(tally, **{name: getattr(tally, name) + 1})


def _is_native(result: CaseResult) -> bool:
    return result.kind in ("native", "fused") or (result.kind == "parts" and not _is_composite(result))


def _is_composite(result: CaseResult) -> bool:
    return result.kind == "composite" or (result.kind == "parts" and COMPOSITE_PREFIX in result.implementation)


def _stations(names: frozenset[str]) -> frozenset[str]:
    # A station with a composite part is counted by that part; where some case runs without it, the station is native.
    return frozenset(name for name in names if name in STATIONS)


def was_asked(state: CheckState) -> bool:
    """Whether a check was asked, or could not be on this machine. One that no case asks was forgotten."""
    return state.cases > 0 or state.control.startswith(IMPOSSIBLE)


def empty_cells(evidence: Evidence, operators: Iterable[str]) -> tuple[str, ...]:
    """Required cells of ``operators`` in which nothing ran although the hardware is there, in words."""
    scope = set(operators)
    words = []
    for level in LEVELS.values():
        for half in HALVES:
            missing = [
                cell
                for cell in cells(level, half, evidence.ranks)
                if cell.operator in scope and not _idle(cell, evidence) and _empty(cell, evidence.tallies)
            ]
            words += [f"{level.name}: {cell}" for cell in missing]
    return tuple(dict.fromkeys(words))


def _empty(cell: Cell, tallies: Mapping[Cell, Tally]) -> bool:
    return cell not in tallies or tallies[cell].empty


def _idle(cell: Cell, evidence: Evidence) -> bool:
    return bool(cell.needs) and evidence.ranks < 2
