"""What a run found: values that are written as JSON and read back unchanged.

A results log is JSON Lines. The first line has ``"type": "run"`` (:class:`RunHeader`); then come ``"case"``
(:class:`CaseResult` with its phase), ``"control"``, ``"failure"`` (:class:`FailureGroup`) and ``"note"`` lines in order
of arrival; a run that came to its end closes with ``"end"``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from polyaccel_conformance.case import Case
from polyaccel_conformance.check import CaseResult, Failure
from polyaccel_conformance.errors import ExitCode
from polyaccel_conformance.promises import Rule
from polyaccel_conformance.subject import Subject

Verdict = Literal["passed", "failed", "not promised", "inconclusive", "not exercised"]
Phase = Literal["covering", "large", "drawn", "given"]

NOTHING: Mapping[str, Any] = MappingProxyType({})
SAME = frozenset(("devices", "torch", "numpy", "hypothesis", "driver"))
"""Parts of the environment that must not change within a run, beside the hashes of sources."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunHeader:
    """What was asked for, and where. Two runs with equal headers (environment and start aside) run the same cases.

    Attributes:
        profile, seed: which extra examples were drawn.
        checks: names of all checks that were asked; ``operators``: of all operators in scope.
        out_of_scope: operators of the contract that a table does not hold.
        mappings: by operator, how a table's implementation is called.
        not_promised: what a table's implementations never offered.
        devices: ranks at most.
        selection: the ``-k`` expression, empty for everything.
        environment: versions, platform, backend distribution, device names.
        started: ISO 8601, UTC.
    """

    subject: Subject
    profile: str
    seed: int
    checks: tuple[str, ...]
    operators: tuple[str, ...]
    out_of_scope: tuple[str, ...] = ()
    mappings: Mapping[str, str] = field(default_factory=lambda: NOTHING)
    not_promised: tuple[Rule, ...] = ()
    devices: int = 1
    selection: str = ""
    environment: Mapping[str, str] = field(default_factory=lambda: NOTHING)
    suite_revision: int = 0
    contract: str = ""
    started: str = ""

    @property
    def complete(self) -> bool:
        """Whether everything that the profile holds was asked for: a certificate needs that."""
        return not self.selection

    def identity(self) -> tuple[object, ...]:
        """What must be equal for a run to be taken up again."""
        names = ("profile", "seed", "checks", "operators", "devices", "selection", "suite_revision", "contract")
        # A part that ran on other sources or another machine would be passed off as one that ran on these.
        environment = {
            key: value for key, value in self.environment.items() if key in SAME or key.startswith("source.")
        }
        return (tuple(self.subject.to_json().items()), environment, *(getattr(self, name) for name in names))


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckState:
    """The verdict on one check over the whole run.

    ``cases``: how many asked it, ``failures``: in how many it failed, ``not_promised``: in how many it failed in
    something that was never offered, ``control``: what its control did, ``reason`` for a verdict that is neither passed
    nor failed.
    """

    check: str
    verdict: Verdict
    cases: int = 0
    failures: int = 0
    not_promised: int = 0
    control: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class CellKey:
    """A cell of the coverage table.

    ``layout``: ``argument=layout``, or ``-`` for an operator without tensor arguments; ``range``: ``size=low..high``
    (:func:`cells.bucket`), or ``-`` for one without sizes. A case counts once in every combination of its arguments'
    layouts and its sizes' ranges.
    """

    operator: str
    dtype: str
    layout: str
    range: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CellCount:
    """What happened in one cell.

    ``not_promised``: cases that failed in nothing that was promised. ``kinds``: cases by kind of implementation
    (``native``, ``fused``, ``parts``, ``composite``; empty where the plan was not reached).
    """

    cell: CellKey
    cases: int
    failed: int
    not_promised: int = 0
    kinds: Mapping[str, int] = field(default_factory=lambda: NOTHING)
    headroom: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorState:
    """One operator over the whole run.

    Attributes:
        cases, failed: how many ran, how many failed some check; ``not_promised``: how many others failed some check in
            something that was never offered.
        planned: how many were to be run.
        kinds, implementations: how many each kind and each named implementation served.
        headroom: worst err / tol under tier 2 by ``output dtype``.
        seconds: of all its cases, and ``slow`` how many took more than 10 ms of a processor.
        reason: why none ran, where none did.
    """

    operator: str
    cases: int = 0
    failed: int = 0
    not_promised: int = 0
    planned: int = 0
    kinds: Mapping[str, int] = field(default_factory=lambda: NOTHING)
    implementations: Mapping[str, int] = field(default_factory=lambda: NOTHING)
    headroom: Mapping[str, float] = field(default_factory=lambda: NOTHING)
    seconds: float = 0.0
    slow: int = 0
    reason: str = ""

    @property
    def verdict(self) -> Verdict:
        if self.failed:
            return "failed"
        if not self.cases:
            return "not exercised"
        if self.cases < self.planned:
            return "inconclusive"
        return "not promised" if self.not_promised else "passed"


@dataclass(frozen=True, slots=True, kw_only=True)
class FailureGroup:
    """All failures of one operator, check and cause, shown by the simplest case found.

    Attributes:
        cases: how many failed so.
        result: of the minimal case; its ``failure`` is the one of this group.
        original: the case from which shrinking started.
        shrink: how many cases were tried for it, in ``shrink_seconds``.
        path: of the case file, empty if none was written.
    """

    operator: str
    check: str
    cause: str
    cases: int
    failure: Failure
    result: CaseResult
    original: Case
    shrink: int = 0
    shrink_seconds: float = 0.0
    path: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """Everything that a report or a certificate is made from, beside the log of single cases.

    Attributes:
        failures: of what was promised; ``not_promised``: of what never was, which say nothing against the subject.
        incomplete: why not all planned cases ran; empty if they did.
        device_lost: the device's last words, empty if it lives.
        empty_cells: required cells in which nothing ran although the hardware is there.
        seconds: wall clock, of this part if the run was taken up again.
    """

    header: RunHeader
    operators: tuple[OperatorState, ...]
    checks: tuple[CheckState, ...]
    cells: tuple[CellCount, ...]
    failures: tuple[FailureGroup, ...]
    not_promised: tuple[FailureGroup, ...] = ()
    incomplete: str = ""
    device_lost: str = ""
    empty_cells: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def cases(self) -> int:
        return sum(state.cases for state in self.operators)

    @property
    def exit_code(self) -> ExitCode:
        if self.device_lost:
            return ExitCode.DEVICE_LOST
        if self.failures or self.empty_cells or any(state.verdict == "failed" for state in self.checks):
            return ExitCode.FAIL
        if self.incomplete or not self.cases or any(state.verdict == "inconclusive" for state in self.checks):
            return ExitCode.INCONCLUSIVE
        return ExitCode.PASS

    def to_json(self) -> dict[str, Any]:
        value: dict[str, Any] = encode(self)
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> RunResult:
        """Raises ValueError for anything that :meth:`to_json` does not write."""
        try:
            return cls(
                header=header_from_json(value["header"]),
                operators=tuple(_operator(item) for item in value["operators"]),
                checks=tuple(CheckState(**item) for item in value["checks"]),
                cells=tuple(_cell(item) for item in value["cells"]),
                failures=tuple(group_from_json(item) for item in value["failures"]),
                not_promised=tuple(group_from_json(item) for item in value.get("not_promised", ())),
                incomplete=value["incomplete"],
                device_lost=value["device_lost"],
                empty_cells=tuple(value["empty_cells"]),
                seconds=value["seconds"],
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a run result: {type(error).__name__}: {error}") from error


def encode(value: Any) -> Any:
    """Dataclasses, mappings and tuples as JSON values; numbers that JSON lacks become ``"nan"`` and ``"inf"``."""
    if isinstance(value, Case):
        return value.to_json()
    if isinstance(value, Subject):
        return value.to_json()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): encode(item) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return [encode(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def result_from_json(value: Mapping[str, Any]) -> CaseResult:
    """A :class:`CaseResult` as :func:`encode` wrote it; further keys are ignored."""
    return CaseResult(
        case=Case.from_json(value["case"]),
        failures=tuple(failure_from_json(item) for item in value["failures"]),
        checks=tuple(value["checks"]),
        implementation=value["implementation"],
        kind=value["kind"],
        headroom={name: float(item) for name, item in value["headroom"].items()},
        digests=dict(value["digests"]),
        observed=value["observed"],
        seconds=value["seconds"],
        cpu=value.get("cpu", 0.0),
        notes=tuple(value.get("notes", ())),
    )


def failure_from_json(value: Mapping[str, Any]) -> Failure:
    fields = dict(value)
    for name in ("got", "expected", "error", "tolerance"):
        fields[name] = None if fields.get(name) is None else float(fields[name])
    return Failure(**{**fields, "index": tuple(fields.get("index", ()))})


def group_from_json(value: Mapping[str, Any]) -> FailureGroup:
    return FailureGroup(
        **{
            **value,
            "failure": failure_from_json(value["failure"]),
            "result": result_from_json(value["result"]),
            "original": Case.from_json(value["original"]),
        }
    )


def header_from_json(value: Mapping[str, Any]) -> RunHeader:
    late = ("mappings", "not_promised")
    fields = {f.name: value[f.name] for f in dataclasses.fields(RunHeader) if f.name not in late}
    for name in ("checks", "operators", "out_of_scope"):
        fields[name] = tuple(fields[name])
    # Older logs have neither.
    fields["mappings"] = dict(value.get("mappings", {}))
    fields["not_promised"] = tuple(Rule.from_json(item) for item in value.get("not_promised", ()))
    return RunHeader(**{**fields, "subject": Subject.from_json(value["subject"])})


def _operator(value: Mapping[str, Any]) -> OperatorState:
    return OperatorState(**{**value, "headroom": {name: float(item) for name, item in value["headroom"].items()}})


def _cell(value: Mapping[str, Any]) -> CellCount:
    return CellCount(**{**value, "cell": CellKey(**value["cell"]), "headroom": float(value["headroom"])})
