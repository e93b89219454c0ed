"""What an implementation under test never promised, so that "not promised" and "wrong" are told apart.

Other projects' kernels were written against their own rules, not against this contract. Where the two differ, the
entry of the table says so, with the reason. A failure that such a rule covers is reported as a group of its own; it
counts neither as passed nor as failed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase

from polyaccel.backend import Entry
from polyaccel_conformance.case import Case
from polyaccel_conformance.check import CaseResult, Failure
from polyaccel_conformance.waivers import holds


@dataclass(frozen=True, slots=True, kw_only=True)
class NotPromised:
    """One difference between an implementation's own rules and the contract.

    Attributes:
        reason: a sentence that says what the project does instead, and where it says so.
        checks: names of checks whose failures this explains, as shell patterns.
        causes: causes of those failures, as shell patterns.
        axes: conditions on the case as in a waiver, all of which must hold: ``dtype=*float16,dims.hidden=0..16``;
            ``*`` for any case.
        at_most: err / tol of the worst element up to which it explains a wrong value; 0 for any failure.
    """

    reason: str
    checks: tuple[str, ...]
    causes: tuple[str, ...] = ("*",)
    axes: str = "*"
    at_most: float = 0.0


@dataclass(frozen=True, slots=True)
class Kernel(Entry):
    """A table's entry for another project's kernel.

    ``mapping``: how the operator's arguments become the kernel's. ``not_promised``: where it need not follow the
    contract. ``distribution``: where it comes from, with the version that is installed.
    """

    mapping: str = ""
    distribution: str = ""
    not_promised: tuple[NotPromised, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule(NotPromised):
    """A :class:`NotPromised` of one operator, as a run records it."""

    operator: str

    def covers(self, case: Case, failure: Failure) -> bool:
        """Whether this failure is of what was never promised."""
        return (
            case.operator == self.operator
            and any(fnmatchcase(failure.check, pattern) for pattern in self.checks)
            and any(fnmatchcase(failure.cause, pattern) for pattern in self.causes)
            and holds(case, self.axes)
            and (not self.at_most or _ratio(failure) <= self.at_most)
        )

    @classmethod
    def from_json(cls, value: Mapping[str, object]) -> Rule:
        """Raises KeyError or TypeError for anything that encoding a rule does not write."""
        return cls(
            operator=str(value["operator"]),
            reason=str(value["reason"]),
            checks=_strings(value["checks"]),
            causes=_strings(value["causes"]),
            axes=str(value["axes"]),
            at_most=float(str(value["at_most"])),
        )


def _ratio(failure: Failure) -> float:
    """err / tol of the worst element; infinite where there is none."""
    if failure.error is None or not failure.tolerance:
        return math.inf
    return failure.error / failure.tolerance


def _strings(value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise TypeError(f"expected a list of strings, not {value!r}")
    return tuple(str(item) for item in value)


def rules(operators: Mapping[str, object]) -> tuple[Rule, ...]:
    """All rules of a table's entries.

    Args:
        operators: what the table maps an operator's name to: a callable, an entry or several of them.
    """
    return tuple(
        Rule(operator=operator, **asdict(difference))
        for operator, kernel in _kernels(operators)
        for difference in kernel.not_promised
    )


def mappings(operators: Mapping[str, object]) -> dict[str, str]:
    """How each operator of a table is called, where the table says so."""
    return {operator: kernel.mapping for operator, kernel in _kernels(operators) if kernel.mapping}


def sources(operators: Mapping[str, object]) -> tuple[str, ...]:
    """The distributions that a table's kernels come from, each once."""
    return tuple(dict.fromkeys(k.distribution for _, k in _kernels(operators) if k.distribution))


def _kernels(operators: Mapping[str, object]) -> Iterator[tuple[str, Kernel]]:
    for operator, given in operators.items():
        for entry in given if isinstance(given, tuple | list) else (given,):
            if isinstance(entry, Kernel):
                yield operator, entry


def judged(result: CaseResult, known: Sequence[Rule]) -> CaseResult:
    """The result with each failure marked that some rule covers."""
    if result.passed or not known:
        return result
    return replace(result, failures=tuple(_marked(result.case, failure, known) for failure in result.failures))


def unexcused(result: CaseResult) -> CaseResult:
    """The result with every failure counted: what runs as a backend has promised the whole contract."""
    if not any(failure.not_promised for failure in result.failures):
        return result
    return replace(result, failures=tuple(replace(failure, not_promised="") for failure in result.failures))


def _marked(case: Case, failure: Failure, known: Sequence[Rule]) -> Failure:
    reason = next((rule.reason for rule in known if rule.covers(case, failure)), "")
    return replace(failure, not_promised=reason) if reason else failure
