"""Failures by operator, check and cause; those of what was never promised apart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from polyaccel_conformance.check import CaseResult, Failure
from polyaccel_conformance.results import FailureGroup

Groups = tuple[FailureGroup, ...]
Key = tuple[str, str, str, str]
"""Of a group: operator, check, cause, and why nothing of it was promised."""


def key_of(operator: str, failure: Failure) -> Key:
    """Which group a failure belongs to."""
    return (operator, failure.check, failure.cause, failure.not_promised)


def failure_groups(results: Sequence[CaseResult], minimal: Iterable[FailureGroup] = ()) -> tuple[Groups, Groups]:
    """Groups of what is wrong, and of what was never promised.

    Args:
        minimal: groups whose minimal cases are known; any other is shown by its first case.
    """
    shown = {key_of(group.operator, group.failure): group for group in minimal}
    groups: dict[Key, FailureGroup] = {}
    for result in results:
        for failure in result.failures:
            key = key_of(result.case.operator, failure)
            known = groups.get(key)
            if known is not None:
                groups[key] = replace(known, cases=known.cases + 1)
            elif key in shown:
                groups[key] = replace(shown[key], cases=1)
            else:
                groups[key] = FailureGroup(
                    operator=key[0],
                    check=key[1],
                    cause=key[2],
                    cases=1,
                    failure=failure,
                    result=result,
                    original=result.case,
                )
    ordered = [groups[key] for key in sorted(groups)]
    return (
        tuple(group for group in ordered if not group.failure.not_promised),
        tuple(group for group in ordered if group.failure.not_promised),
    )
