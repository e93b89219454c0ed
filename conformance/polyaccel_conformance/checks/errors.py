"""Whether a failure that a device reports late reaches the host, says what failed, and ends everything after it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from polyaccel.backend import OPERATORS, STATIONS
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Case
from polyaccel_conformance.check import Check, Control, Failure
from polyaccel_conformance.harness.controls import all_of, linear_problem
from polyaccel_conformance.harness.devices import instruments
from polyaccel_conformance.harness.faults import WAITS, FailureReport, Operand, Wait, late_failure
from polyaccel_conformance.problem import Problem
from polyaccel_conformance.trial import Setting, Trial

Report = Callable[[Wait], FailureReport]


class _Late(Check):
    """Asked of a kernel that fails long after its launch has returned, in a process of its own."""

    share: int
    """One case in so many, whichever they are; the processes take their time."""

    def applies(self, case: Case, problem: Problem) -> bool:
        known = case.operator in OPERATORS or case.operator in STATIONS
        return known and case.ranks == 1 and problem.spec.group != "ranks" and int(case.key, 16) % self.share == 0

    def unavailable(self, bench: Bench) -> str:
        if bench.subject is None:
            return "nobody said how another process opens this backend"
        tools = instruments(bench)
        return tools.lacks("failures") or tools.lacks("activity")

    def run(self, trial: Trial) -> Failure | None:
        if not trial.problem.operands or trial.observe().error is not None or not _launches(trial):
            return None
        return self.judge(trial.problem, lambda wait: late_failure(trial.bench, trial.problem.case, wait))

    @abstractmethod
    def judge(self, problem: Problem, report: Report) -> Failure | None:
        """What is wrong with the reports."""

    def fail(self, cause: str, message: str) -> Failure:
        return Failure(check=self.name, cause=cause, message=message)


class AsyncOperator(_Late):
    """The error names operator, rank and every operand's shape, strides and dtype; everything that is tried later
    raises DeviceLost and returns no numbers."""

    name = "errors.async_operator"
    share = 16

    def judge(self, problem: Problem, report: Report) -> Failure | None:
        found = report("synchronize")
        if found.raised != "OperatorError":
            what = f"{found.raised}: {found.message}" if found.raised else "nothing was raised"
            return self.fail("no OperatorError for a late failure", what)
        if not _names_operator(problem, found):
            return self.fail("operator not named", f"{found.operator!r} for {problem.case.operator}: {found.message}")
        if found.rank != 0:
            return self.fail("rank not named", f"rank {found.rank}, expected 0: {found.message}")
        missing = _missing(problem, found)
        if missing:
            return self.fail("operand not described", f"{', '.join(missing)} not in: {found.message}")
        wrong = [f"{what}: {kind}" for what, kind in found.later.items() if kind != "DeviceLost"]
        if wrong:
            return self.fail("later calls do not raise DeviceLost", "; ".join(wrong))
        return None

    def control(self, bench: Bench) -> Control:
        """The true report with one thing spoilt at a time."""
        problem = linear_problem()
        true = late_failure(bench, problem.case, "synchronize")
        spoilt = (
            {"raised": "RuntimeError"},
            {"operator": "something"},
            {"rank": None},
            {"operands": true.operands[1:]},
            {"later": {**true.later, "another call": "numbers"}},
        )
        return all_of(*(_noticed(self, problem, _with(true, **change)) for change in spoilt))


class Swallowed(_Late):
    """Whichever way the host waits, a failure that happened before is raised there."""

    name = "errors.swallowed"
    share = 48

    def judge(self, problem: Problem, report: Report) -> Failure | None:
        silent = []
        for wait in WAITS:
            found = report(wait)
            if found.launched and not found.raised:
                silent.append(wait)
        return self.fail("failure swallowed", f"nothing was raised by: {', '.join(silent)}") if silent else None

    def control(self, bench: Bench) -> Control:
        """The true report of one wait with its error removed."""
        problem = linear_problem()
        true = late_failure(bench, problem.case, "event")
        return _noticed(self, problem, _with(true, raised=""))


def _launches(trial: Trial) -> bool:
    """Whether the call launches anything that could fail."""
    prepared = trial.problem.prepare(trial.bench)
    try:
        tensors = trial.tensors(trial.guarded(Setting()), Setting())
        resolved = trial.resolve(prepared)
        with instruments(trial.bench).recording() as recorded:
            trial.call(resolved, prepared, tensors)
    finally:
        prepared.release()
    return recorded.count("kernel") > 0


def _names_operator(problem: Problem, found: FailureReport) -> bool:
    """The operator of the contract, or a kernel that the ledger counted for it."""
    names: Sequence[str] = (problem.case.operator, *problem.spec.parts)
    return found.operator in found.ran or any(name in found.operator for name in names)


def _missing(problem: Problem, found: FailureReport) -> list[str]:
    """Operands of the call that the error does not describe. Of a station, the first kernel has taken the first."""
    left = [_value(operand) for operand in found.operands]
    passed = found.passed[:1] if problem.spec.is_station else found.passed
    missing = []
    for operand in passed:
        if _value(operand) in left:
            left.remove(_value(operand))
        else:
            missing.append(f"{operand.name} {operand.dtype}{list(operand.shape)} stride {list(operand.stride)}")
    return missing


def _value(operand: Operand) -> tuple[object, ...]:
    return operand.shape, operand.stride, operand.dtype


def _with(report: FailureReport, **changes: object) -> FailureReport:
    return replace(report, **changes)  # type: ignore[arg-type]


def _noticed(check: _Late, problem: Problem, report: FailureReport) -> Control:
    return "did not fail" if check.judge(problem, lambda wait: report) is None else "failed as it must"


ERROR_CHECKS: Mapping[str, Check] = {check.name: check for check in (AsyncOperator(), Swallowed())}
