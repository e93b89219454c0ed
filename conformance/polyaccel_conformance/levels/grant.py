"""What may be granted, from what was seen. Pure: the same evidence always gives the same levels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType

from polyaccel.backend.levels import DEVICES, LEVELS, Level
from polyaccel_conformance.levels.cell import HALVES, Cell, cells, restriction, summary
from polyaccel_conformance.multi.devices import objections, qualification, world
from polyaccel_conformance.multi.identity import RankIdentity


class Verdict(Enum):
    """Of a level. ``NOT_EXERCISED``: the machine lacks what it needs; ``NOT_CLAIMED``: the backend says it lacks it."""

    GRANTED = "granted"
    RESTRICTED = "restricted"
    NOT_GRANTED = "not granted"
    NOT_EXERCISED = "not exercised"
    NOT_CLAIMED = "not claimed"


class Asked(Enum):
    """What became of a check."""

    PASSED = "passed"
    FAILED = "failed"
    INCONCLUSIVE = "inconclusive"
    NOT_EXERCISED = "not exercised"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """Cases of a cell: ``refused`` ones ran as composites although the backend claims the operator, or not at all."""

    passed: int = 0
    failed: int = 0
    refused: int = 0

    @property
    def empty(self) -> bool:
        return self.passed + self.failed + self.refused == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """Everything that decides about levels.

    Attributes:
        tallies: by cell; a cell that is missing is empty.
        failures: by operator, cases with a failure that no waiver covers.
        waived: by operator, cases whose every failure a waiver covers; their cells count as passed.
        restrictions: by operator, what it declares below the contract's floor, in words; waived or not.
        checks: what became of each check that was asked.
        asked: by operator, the checks that its cases were asked.
        native, composite: operators by how they ran; one that ran both ways is in both.
        devices: devices of the backend on this machine; ``ranks``: the world size that took part, 1 for none.
        graphs: whether the backend captures graphs, and if not why.
        simulated: the devices are no hardware; ``identities``: who the ranks of each world were.
        complete: whether every planned case ran. A partial run grants nothing.
    """

    tallies: Mapping[Cell, Tally] = field(default_factory=lambda: MappingProxyType({}))
    failures: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    waived: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    restrictions: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: MappingProxyType({}))
    checks: Mapping[str, Asked] = field(default_factory=lambda: MappingProxyType({}))
    asked: Mapping[str, frozenset[str]] = field(default_factory=lambda: MappingProxyType({}))
    native: frozenset[str] = frozenset()
    composite: frozenset[str] = frozenset()
    devices: int = 1
    ranks: int = 1
    graphs: str = ""
    simulated: bool = False
    identities: tuple[RankIdentity, ...] = ()
    complete: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class LevelResult:
    """One level's verdict and why.

    Attributes:
        half: the 16-bit type it was judged with, empty where it has none.
        reasons: why it was not granted, each a sentence.
        refused: required cells that the backend refuses.
        restriction: the same in the words of the title.
        declared: what its operators declare below the contract's floor, which the title names as well.
        not_exercised: required cells and checks that this machine cannot exercise.
        native, composite: operators of the level by how they ran.
        waived: failing cases of its operators that waivers cover.
        qualification: what the devices were, where they were no hardware or fewer than the ranks.
    """

    level: Level
    verdict: Verdict
    half: str = ""
    reasons: tuple[str, ...] = ()
    refused: tuple[Cell, ...] = ()
    restriction: str = ""
    declared: tuple[str, ...] = ()
    not_exercised: tuple[str, ...] = ()
    native: tuple[str, ...] = ()
    composite: tuple[str, ...] = ()
    waived: int = 0
    qualification: str = ""

    @property
    def name(self) -> str:
        """``L6 several devices (2 ranks sharing 1 device: cpu; float32, bfloat16)``: what was earned. A restriction and
        what the devices were are part of it."""
        name = self.level.name
        if self.verdict is Verdict.RESTRICTED:
            name = f"{name} restricted: {'; '.join(filter(None, [self.restriction, *self.declared]))};"
        said = "; ".join(filter(None, [self.qualification, f"float32, {self.half}" if self.half else ""]))
        return f"{name} {self.level.title}" + (f" ({said})" if said else "")

    @property
    def title(self) -> str:
        """The name and how it was earned: ``L3 LoRA (float32, bfloat16): 3 native, 0 composite``."""
        counts = f": {len(self.native)} native, {len(self.composite)} composite" if self.level.table else ""
        waived = f", {self.waived} failing cases waived" if self.waived else ""
        return f"{self.name}{counts}{waived}"

    @property
    def earned(self) -> bool:
        return self.verdict in (Verdict.GRANTED, Verdict.RESTRICTED)

    def to_json(self) -> dict[str, object]:
        return {
            "level": self.level.name,
            "title": self.title,
            "devices": self.qualification,
            "verdict": self.verdict.value,
            "half": self.half,
            "reasons": list(self.reasons),
            "refused": [str(cell) for cell in self.refused],
            "declared": list(self.declared),
            "not_exercised": list(self.not_exercised),
            "native": list(self.native),
            "composite": list(self.composite),
            "waived": self.waived,
        }


def grant(evidence: Evidence, *, require_native: bool = False) -> tuple[LevelResult, ...]:
    """Every level in order. ``require_native``: a composite among a level's operators denies the level."""
    results: dict[str, LevelResult] = {}
    for level in LEVELS.values():
        results[level.name] = _level(level, evidence, results, require_native)
    return tuple(results.values())


def _level(level: Level, evidence: Evidence, below: Mapping[str, LevelResult], require_native: bool) -> LevelResult:
    if level.name == "L6" and evidence.ranks < 2:
        reason = "only one rank took part" if evidence.devices > 1 else "there is one device"
        return LevelResult(level=level, verdict=Verdict.NOT_EXERCISED, reasons=(reason,))
    if level.name == "L7" and evidence.graphs:
        return LevelResult(level=level, verdict=Verdict.NOT_CLAIMED, reasons=(evidence.graphs,))
    if not level.table:
        return _judged(level, "", (), evidence, below, require_native)
    attempts = [
        _judged(level, half, cells(level, half, evidence.ranks), evidence, below, require_native) for half in HALVES
    ]
    # The better of the two 16-bit types; the first where they are equal.
    return min(attempts, key=lambda found: (_ORDER.index(found.verdict), len(found.reasons), len(found.refused)))


NATIVE_REQUIRED = "composites where native was required"
_ORDER = (
    Verdict.GRANTED,
    Verdict.RESTRICTED,
    Verdict.NOT_GRANTED,
    Verdict.NOT_EXERCISED,
    Verdict.NOT_CLAIMED,
)


def _judged(
    level: Level,
    half: str,
    required: Sequence[Cell],
    evidence: Evidence,
    below: Mapping[str, LevelResult],
    require_native: bool,
) -> LevelResult:
    reasons: list[str] = [] if evidence.complete else ["the run is partial"]
    several = any(row.needs == DEVICES for row in level.table)
    if several:
        reasons += objections(evidence.identities, evidence.ranks)
    reasons += [
        f"it builds on {name}, which is {below[name].verdict.value}"
        for name in level.builds_on
        if not below[name].earned
    ]
    refused: list[Cell] = []
    failed: list[Cell] = []
    empty: list[Cell] = []
    idle: list[str] = []
    for cell in required:
        tally = evidence.tallies.get(cell, Tally())
        if cell.needs == DEVICES and evidence.ranks < 2:
            idle.append(str(cell))
        elif tally.empty:
            empty.append(cell)
        elif tally.failed:
            failed.append(cell)
        elif tally.refused:
            refused.append(cell)
    wrong = {name: count for name in level.operators if (count := evidence.failures.get(name, 0))}
    reasons += [f"{name}: {count} cases failed" for name, count in wrong.items()]
    if failed and not wrong:
        reasons.append(f"failed: {summary(failed)}")
    if empty:
        reasons.append(f"no case covers {_brief(empty, required)}")
    more, unexercised = _checks(level, evidence)
    reasons += more
    idle += unexercised
    native = tuple(name for name in level.operators if name in evidence.native and name not in evidence.composite)
    composite = tuple(name for name in level.operators if name in evidence.composite)
    if require_native and composite:
        reasons.append(f"{NATIVE_REQUIRED}: {', '.join(composite)}")
    declared = tuple(
        f"{name} {', '.join(evidence.restrictions[name])}" for name in level.operators if name in evidence.restrictions
    )
    restricted = refused or declared
    verdict = Verdict.NOT_GRANTED if reasons else Verdict.RESTRICTED if restricted else Verdict.GRANTED
    return LevelResult(
        level=level,
        verdict=verdict,
        half=half,
        reasons=tuple(reasons),
        refused=tuple(refused),
        restriction=restriction(refused, required),
        declared=declared,
        not_exercised=tuple(idle),
        native=native,
        composite=composite,
        qualification=_devices(evidence, several=several),
        waived=sum(evidence.waived.get(name, 0) for name in level.operators),
    )


def _devices(evidence: Evidence, *, several: bool) -> str:
    if several:
        return qualification(world(evidence.identities, evidence.ranks))
    return "simulated device" if evidence.simulated else ""


def _brief(some: Sequence[Cell], every: Sequence[Cell]) -> str:
    """Cells in words; an operator of which every cell is meant by its name alone."""
    missing = set(some)
    names = dict.fromkeys(cell.operator for cell in some)
    whole = [name for name in names if all(cell in missing for cell in every if cell.operator == name)]
    rest = summary(cell for cell in some if cell.operator not in whole)
    return "; ".join([*([f"{', '.join(whole)} at all"] if whole else []), *([rest] if rest else [])])


def _checks(level: Level, evidence: Evidence) -> tuple[list[str], list[str]]:
    """Why the level's questions deny it, and which of them could not be asked here."""
    asked = {name for operator in level.operators for name in evidence.asked.get(operator, ())}
    states = {name: evidence.checks[name] for name in sorted({*asked, *level.checks}) if name in evidence.checks}
    missing = [name for name in level.checks if name not in evidence.checks]
    unsure = [name for name, state in states.items() if state is Asked.INCONCLUSIVE]
    failed = [name for name, state in states.items() if state is Asked.FAILED and name in level.checks]
    reasons = [
        f"{text}: {', '.join(names)}"
        for text, names in (
            ("checks that were not asked", missing),
            ("checks that failed", failed),
            ("inconclusive checks, whose controls did not fail", unsure),
        )
        if names
    ]
    return reasons, [f"check {name}" for name, state in states.items() if state is Asked.NOT_EXERCISED]


def earned(results: Iterable[LevelResult]) -> tuple[LevelResult, ...]:
    """The granted and restricted ones."""
    return tuple(result for result in results if result.earned)
