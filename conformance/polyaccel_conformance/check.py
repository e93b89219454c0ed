"""A check: one question asked of every case that it applies to, and the control that shows it can fail."""

from __future__ import annotations

import hashlib
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from polyaccel.backend import Planned, PolyaccelError
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Case
from polyaccel_conformance.compare import headroom
from polyaccel_conformance.problem import Exactly, Problem
from polyaccel_conformance.trial import Trial

Level = Literal["L0", "L1", "L2", "L3", "L4", "L5", "L6", "L7"]
Control = Literal["failed as it must", "did not fail", "impossible here"]

RESTRICTION = "restriction: "
"""Begins the cause of a failure that is a declaration below the contract's floor. It denies no level, whose title names
it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """What a check found wrong in one case. Strings and numbers only.

    Attributes:
        cause: a few words that are the same for all failures of one kind; failures are grouped by it.
        message: one sentence with the values.
        output: which output, and ``index`` its worst element.
        got, expected, error, tolerance: of that element; error and tolerance None where equality was asked for.
        term: the largest contribution to the tolerance.
        pattern: where the wrong elements lie: ``"every row 15 mod 16"``, ``"last column"``.
        not_promised: why this is nothing that the implementation ever offered, from its table; empty where it is wrong.
    """

    check: str
    cause: str
    message: str
    output: str = ""
    index: tuple[int, ...] = ()
    got: float | None = None
    expected: float | None = None
    error: float | None = None
    tolerance: float | None = None
    term: str = ""
    pattern: str = ""
    not_promised: str = ""


class Check(ABC):
    """A named question. ``levels`` that need it; ``tier`` 1 exact, 2 bound, 3 measured, 0 for what is no arithmetic."""

    name: str
    tier: int = 0

    def applies(self, case: Case, problem: Problem) -> bool:
        """Whether the question has a meaning for this case: by default, for all that call an operator."""
        return problem.arithmetic

    def unavailable(self, bench: Bench) -> str:
        """Why the question cannot be asked on this device, which has nothing to ask it of; empty if it can. The check
        is then not exercised: neither passed nor inconclusive."""
        return ""

    @abstractmethod
    def run(self, trial: Trial) -> Failure | None:
        """Ask it. May raise PolyaccelError only for what the backend raised unasked."""

    def notes(self, trial: Trial) -> Sequence[str]:
        """What the check found that is no failure, after :meth:`run`: a measured figure, evidence that is missing."""
        return ()

    @abstractmethod
    def control(self, bench: Bench) -> Control:
        """Ask the same question of something deliberately wrong on the same device: it must fail, or the check proves
        nothing there and is inconclusive."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseResult:
    """Everything that is recorded of one case.

    ``headroom``: err / tol of each output under tier 2. ``digests``: of the inputs. ``observed``: hash of the outputs.
    ``seconds``: of the clock; ``cpu``: of the worker's processor, 0 where several ranks took part. ``notes``: what was
    measured and is no failure.
    """

    case: Case
    failures: tuple[Failure, ...]
    checks: tuple[str, ...]
    implementation: str
    kind: str
    headroom: Mapping[str, float] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    observed: str = ""
    seconds: float = 0.0
    cpu: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def wrong(self) -> bool:
        """Whether it failed in something that was promised."""
        return any(not failure.not_promised for failure in self.failures)

    @property
    def excused(self) -> bool:
        """Whether it failed, but in nothing that was promised."""
        return not self.passed and not self.wrong


def run_case(bench: Bench, problem: Problem, checks: Sequence[Check], *, thorough: bool = True) -> CaseResult:
    """Ask every check that applies; failures are collected.

    An error of the backend that no check asked for is a failure of cause ``error``, any other exception one of cause
    ``crash: <type>``. The checks share their calls: what they all meet in the same call is reported once, by the first.

    Args:
        thorough: every part of every question, not only those whose turn it is (:meth:`Trial.asks`).
    """
    started, used = time.perf_counter(), time.process_time()
    trial = Trial(bench, problem, thorough=thorough)
    case = problem.case
    failures: list[Failure] = []
    asked: list[str] = []
    notes: list[str] = []
    met: list[BaseException] = []
    for check in checks:
        if not check.applies(case, problem) or check.unavailable(bench):
            continue
        asked.append(check.name)
        try:
            found = check.run(trial)
        except PolyaccelError as raised:
            if not trial.excuses(raised) and not _known(raised, met):
                failures.append(Failure(check=check.name, cause="error", message=f"{type(raised).__name__}: {raised}"))
        except Exception as raised:
            if not _known(raised, met):
                where = _origin(raised)
                failures.append(
                    Failure(check=check.name, cause=f"crash: {type(raised).__name__}", message=f"{raised}{where}")
                )
        else:
            if found is not None:
                failures.append(found)
            notes += check.notes(trial)
    trial.close()
    planned, observed, headrooms = _summary(trial)
    return CaseResult(
        case=case,
        failures=tuple(failures),
        checks=tuple(asked),
        implementation="" if planned is None else str(planned),
        kind="" if planned is None else planned.kind,
        headroom=headrooms,
        digests=problem.digests(),
        observed=observed,
        seconds=time.perf_counter() - started,
        cpu=time.process_time() - used,
        notes=tuple(dict.fromkeys(notes)),
    )


def _known(raised: BaseException, met: list[BaseException]) -> bool:
    """Whether another check has met this very exception; remembers it."""
    if any(raised is other for other in met):
        return True
    met.append(raised)
    return False


def _origin(raised: BaseException) -> str:
    frames = traceback.extract_tb(raised.__traceback__)
    return f" (in {frames[-1].name}, {Path(frames[-1].filename).name} line {frames[-1].lineno})" if frames else ""


def _summary(trial: Trial) -> tuple[Planned | None, str, Mapping[str, float]]:
    """What was planned, a hash of the outputs, and how much of the tolerance each used. Makes no call of its own."""
    observation = trial.seen()
    if observation is None:
        return None, "", {}
    hasher = hashlib.sha256()
    for name in sorted(observation.outputs):
        output = observation.outputs[name]
        hasher.update(f"{name} {output.dtype} {output.bits.shape}".encode())
        hasher.update(output.bits.astype(output.bits.dtype.newbyteorder("<"), copy=False).tobytes())
    found: dict[str, float] = {}
    if observation.outputs:
        for name, expected in trial.expected.items():
            values = observation.outputs[name].values if name in observation.outputs else None
            if values is None or isinstance(expected, Exactly) or expected.exact:
                continue
            if values.shape == expected.value.shape:
                found[name] = headroom(expected, values)
    digest = hasher.hexdigest()[:32] if observation.outputs else ""
    return observation.planned, digest, found
