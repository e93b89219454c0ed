"""A check: one question asked of every case that it applies to, and the control that shows it can fail."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Case
from polyaccel_conformance.problem import Problem
from polyaccel_conformance.trial import Trial

Level = Literal["L0", "L1", "L2", "L3", "L4", "L5", "L6", "L7"]
Control = Literal["failed as it must", "did not fail", "impossible here"]


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """The plan has no native implementation for this case: not a failure by itself, counted by the levels."""

    reasons: tuple[str, ...]


class Check(ABC):
    """A named question. ``levels`` that need it; ``tier`` 1 exact, 2 bound, 3 measured, 0 for what is no arithmetic."""

    name: str
    tier: int = 0

    def applies(self, case: Case, problem: Problem) -> bool:
        """Whether the question has a meaning for this case."""
        return True

    @abstractmethod
    def run(self, trial: Trial) -> Failure | None:
        """Ask it. May raise PolyaccelError only for what the backend raised unasked."""

    @abstractmethod
    def control(self, bench: Bench) -> Control:
        """Ask the same question of something deliberately wrong on the same device: it must fail, or the check proves
        nothing there and is inconclusive."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseResult:
    """Everything that is recorded of one case. ``headroom``: err / tol of each output under tier 2."""

    case: Case
    failures: tuple[Failure, ...]
    checks: tuple[str, ...]
    implementation: str
    kind: str
    headroom: Mapping[str, float] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    observed: str = ""
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return not self.failures


def run_case(bench: Bench, problem: Problem, checks: Sequence[Check]) -> CaseResult:
    """Ask every check that applies; failures are collected, an unexpected error is one."""
    raise NotImplementedError
