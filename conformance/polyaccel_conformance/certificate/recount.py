"""Every figure of a run worked out again from its log alone: what a certificate states and what verifying repeats."""

from __future__ import annotations

import datetime
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from polyaccel_conformance.certificate.environment import machine
from polyaccel_conformance.check import CaseResult
from polyaccel_conformance.grouping import failure_groups
from polyaccel_conformance.levels.evidence import empty_cells, gather
from polyaccel_conformance.levels.grant import LevelResult, grant
from polyaccel_conformance.log import Logged
from polyaccel_conformance.promises import unexcused
from polyaccel_conformance.report.model import Report
from polyaccel_conformance.results import RunResult
from polyaccel_conformance.tally import Tally
from polyaccel_conformance.waivers import Waiver, apply_waivers


def recount(logged: Logged, waivers: Sequence[Waiver] = (), *, require_native: bool = False) -> Report:
    """The report that a log leads to. Waivers are judged by the day on which the run began."""
    results = [result for _, result in logged.results]
    if logged.header.subject.kind == "backend":
        results = [unexcused(result) for result in results]
    tally = Tally(results=results, controls=dict(logged.controls))
    for case_result in results:
        tally.plan(case_result.case.operator)
    checks = tally.check_states(logged.header.checks)
    incomplete = "" if logged.ended else "the log has no end: the run was interrupted"
    whole = not incomplete and logged.header.complete
    failing, excused = failure_groups(results, logged.groups)
    result = RunResult(
        header=logged.header,
        operators=tally.operator_states(logged.header),
        checks=checks,
        cells=tally.cells(),
        failures=failing,
        not_promised=excused,
        incomplete=incomplete,
        seconds=round(math.fsum(r.seconds for r in results), 3),
    )
    failures = [
        (position, r.case, f.check) for position, r in enumerate(results) for f in r.failures if not f.not_promised
    ]
    applied = apply_waivers(waivers, [(case, check) for _, case, check in failures], day(logged.header.started))
    waived = _waived(results, failures, applied.covered)
    levels: tuple[LevelResult, ...] = ()
    if logged.header.subject.kind == "backend":
        ranks = max((result.case.ranks for result in results), default=1)
        evidence = gather(
            results,
            checks,
            machine(logged.header.environment, ranks, logged.identities),
            waived=waived,
            complete=whole and not applied.problems,
        )
        levels = grant(evidence, require_native=require_native)
        if whole:
            result = replace(result, empty_cells=empty_cells(evidence, logged.header.operators))
    left = Counter(case.operator for i, (_, case, _) in enumerate(failures) if i not in applied.covered)
    return Report(
        result=result,
        levels=levels,
        waivers=tuple(waivers),
        applied=applied,
        unwaived=tuple(sorted(left.items())),
        identities=logged.identities,
    )


def day(started: str) -> datetime.date:
    """The day of an ISO 8601 time; the first day there is for one that says nothing."""
    try:
        return datetime.datetime.fromisoformat(started).date()
    except ValueError:
        return datetime.date.min


def _waived(
    results: Sequence[CaseResult], failures: Sequence[tuple[int, object, str]], covered: frozenset[int]
) -> frozenset[int]:
    """Positions of the cases of which every failure is covered."""
    open_cases = {position for i, (position, _, _) in enumerate(failures) if i not in covered}
    return frozenset(p for p, result in enumerate(results) if not result.passed and p not in open_cases)
