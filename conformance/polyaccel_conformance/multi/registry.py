"""Cases of several ranks, by operator. They are kept apart from those of one: a world of one shows nothing of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from polyaccel_conformance.errors import UsageError
from polyaccel_conformance.models.layers import LayersProblems
from polyaccel_conformance.problem import ProblemSet
from polyaccel_conformance.problems.collectives import COLLECTIVE_SETS
from polyaccel_conformance.problems.sharded_sets import SHARDED_SETS
from polyaccel_conformance.problems.sharded_sum import SUMMED_SETS

RANKED_SETS: Mapping[str, ProblemSet] = MappingProxyType(
    {s.operator: s for s in (*COLLECTIVE_SETS, *SHARDED_SETS, *SUMMED_SETS, LayersProblems())}
)
"""The axis ``ranks`` is not listed by the sets: whoever draws a case adds the size of the world before it is mended."""

LOCKSTEP = ("values.", "memory.", "invariance.", "numerics.", "comm.", "lora.tp_", "model.layers")
"""Checks that ranks ask together. The others look at one call on one device, which a world of one shows as well, and
may end on one rank while the others are still in a collective."""


def lockstep_checks() -> tuple[str, ...]:
    """Names of the checks for cases of several ranks, in their order."""
    from polyaccel_conformance.checks.registry import CHECKS

    return in_lockstep(CHECKS)


def in_lockstep(names: Iterable[str]) -> tuple[str, ...]:
    """Those of the names that ranks can ask together, in their order."""
    return tuple(name for name in names if name.startswith(LOCKSTEP))


def ranked_set(operator: str) -> ProblemSet:
    """The cases of an operator for several ranks.

    Raises:
        UsageError: it has none.
    """
    found = RANKED_SETS.get(operator)
    if found is None:
        raise UsageError(f"operator {operator!r} has no cases for several ranks; {', '.join(RANKED_SETS)} have")
    return found
