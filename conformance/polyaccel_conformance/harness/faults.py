"""What a backend does with failures that its device reports late. Every function here loses the device that it is asked
about, so it is run in a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

from polyaccel.backend import DeviceLost, OperatorError, PolyaccelError
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Case
from polyaccel_conformance.errors import ConformanceError
from polyaccel_conformance.harness.devices import instruments
from polyaccel_conformance.harness.isolation import run_isolated, starter_of
from polyaccel_conformance.problem import Prepared
from polyaccel_conformance.subject import Subject
from polyaccel_conformance.trial import Setting, Trial, returned

Wait = Literal["synchronize", "event", "download", "read"]
WAITS: tuple[Wait, ...] = ("synchronize", "event", "download", "read")
"""Ways in which the host learns that work is done; each has to report a failure."""

TARGET = "polyaccel_conformance.harness.faults:observe_failure"


@dataclass(frozen=True, slots=True, kw_only=True)
class Operand:
    """A tensor as the call had it, or as an error describes it."""

    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Operand:
        lists = {name: tuple(value[name]) for name in ("shape", "stride")}
        return cls(name=value["name"], dtype=value["dtype"], **lists)


@dataclass(frozen=True, slots=True, kw_only=True)
class FailureReport:
    """What came of one kernel that failed late.

    Attributes:
        launched: the call returned before the failure, as it must where launches are asynchronous.
        raised: type of the error where the host waited, empty for none; its ``message``, ``operator``, ``rank`` and
            ``operands``.
        ran: names that the ledger recorded for the call.
        passed: the tensor operands of the call.
        later: by what was tried afterwards, the type of the error, or ``"numbers"``.
    """

    launched: bool
    raised: str = ""
    message: str = ""
    operator: str = ""
    rank: int | None = None
    operands: tuple[Operand, ...] = ()
    ran: tuple[str, ...] = ()
    passed: tuple[Operand, ...] = ()
    later: Mapping[str, str] = field(default_factory=dict)


def late_failure(bench: Bench, case: Case, wait: Wait, *, timeout: float = 60.0) -> FailureReport:
    """Let the first kernel of a case fail late, in another process.

    Raises:
        ConformanceError: the bench does not say how to open its backend there, or the process ended without a report.
    """
    if bench.subject is None:
        raise ConformanceError("nobody said how another process opens this backend")
    outcome = run_isolated(
        starter_of(bench), TARGET, bench.subject.to_json(), case.to_json(), bench.device.index, wait, timeout=timeout
    )
    if outcome.ending != "value":
        raise ConformanceError(f"the process in which a kernel was to fail {outcome}")
    report = dict(outcome.value)
    report["ran"] = tuple(report["ran"])
    for name in ("operands", "passed"):
        report[name] = tuple(Operand.from_json(operand) for operand in report[name])
    return FailureReport(**report)


def observe_failure(subject: Mapping[str, str], case: Mapping[str, Any], device: int, wait: Wait) -> dict[str, Any]:
    """In a process of its own: :class:`FailureReport` as plain values."""
    from polyaccel_conformance.problems.registry import PROBLEM_SETS

    backend = Subject(**subject).open()  # type: ignore[arg-type]
    bench = Bench(backend, backend.devices()[device])
    found = Case.from_json(case)
    return asdict(fail_late(bench, Trial(bench, PROBLEM_SETS[found.operator].problem(found)), wait))


def fail_late(bench: Bench, trial: Trial, wait: Wait) -> FailureReport:
    """In this process, whose device is lost afterwards."""
    prepared = trial.problem.prepare(bench)
    tensors = trial.tensors(trial.guarded(Setting()), Setting())
    resolved = trial.resolve(prepared)
    bench.synchronize()
    passed = tuple(_describe(name, tensor) for name, tensor in tensors.items())
    before = bench.backend.ledger.counts()
    instruments(bench).arm_failure()
    result: object = None
    try:
        result = trial.call(resolved, prepared, tensors)
    except Exception as error:
        return _report(error, launched=False, passed=passed)
    ran = tuple(name for name, n in bench.backend.ledger.counts().items() if n != before.get(name, 0))
    outputs = returned(result) or list(tensors.values())
    raised: Exception | None = None
    try:
        _wait(bench, wait, outputs)
    except Exception as error:
        raised = error
    later = {
        "the same wait": _kind(lambda: _wait(bench, wait, outputs)),
        "another call": _kind(lambda: _again(bench, trial, tensors, prepared)),
        "an upload": _kind(lambda: bench.upload(torch.zeros(4))),
        "waiting for the device": _kind(bench.synchronize),
        "reading the result": _kind(lambda: [output.to("cpu") for output in outputs]),
    }
    return _report(raised, launched=True, passed=passed, ran=ran, later=later)


def _wait(bench: Bench, wait: Wait, outputs: list[torch.Tensor]) -> None:
    if wait == "synchronize":
        bench.synchronize()
    elif wait == "event":
        bench.device.record().synchronize()
    elif wait == "download":
        for copy in [bench.device.download(output) for output in outputs]:
            copy.wait()
    else:
        for output in outputs:
            output.to("cpu")


def _again(bench: Bench, trial: Trial, tensors: Mapping[str, torch.Tensor], prepared: Prepared) -> None:
    trial.call(trial.resolve(prepared), prepared, tensors)
    bench.synchronize()


def _kind(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except Exception as error:
        return type(error).__name__ if not isinstance(error, DeviceLost) else DeviceLost.__name__
    return "numbers"


def _report(error: Exception | None, **known: Any) -> FailureReport:
    if error is None:
        return FailureReport(**known)
    kind = "OperatorError" if isinstance(error, OperatorError) else type(error).__name__
    if not isinstance(error, OperatorError):
        typed = "" if isinstance(error, PolyaccelError) else " (no error of polyaccel's)"
        return FailureReport(raised=kind, message=f"{error}{typed}", **known)
    operands = tuple(
        Operand(name=o.name, shape=tuple(o.shape), stride=tuple(o.stride), dtype=o.dtype) for o in error.operands
    )
    return FailureReport(
        raised=kind, message=str(error), operator=error.operator, rank=error.rank, operands=operands, **known
    )


def _describe(name: str, tensor: torch.Tensor) -> Operand:
    return Operand(
        name=name,
        shape=tuple(tensor.shape),
        stride=tuple(tensor.stride()),
        dtype=str(tensor.dtype).removeprefix("torch."),
    )
