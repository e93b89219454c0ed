"""Failures by operator, check and cause; those of what was never promised apart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from polyaccel_conformance.check import CaseResult
from polyaccel_conformance.results import FailureGroup

Groups = tuple[FailureGroup, ...]
Key = tuple[str, str, str, str]


def failure_groups(results: Sequence[CaseResult], minimal: Iterable[FailureGroup] = ()) -> tuple[Groups, Groups]:
    """Groups of what is wrong, and of what was never promised.

    Args:
        minimal: groups whose minimal cases are known; any other is shown by its first case.
    """
    shown = {_key(group): group for group in minimal}
    groups: dict[Key, FailureGroup] = {}
    for result in results:
        for failure in result.failures:
            key = (result.case.operator, failure.check, failure.cause, failure.not_promised)
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


def _key(group: FailureGroup) -> Key:
    return (group.operator, group.check, group.cause, group.failure.not_promised)
