"""Cases of several ranks, by operator. They are kept apart from those of one: a world of one shows nothing of them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from polyaccel_conformance.errors import UsageError
from polyaccel_conformance.problem import ProblemSet
from polyaccel_conformance.problems.collectives import COLLECTIVE_SETS
from polyaccel_conformance.problems.sharded import SHARDED_SETS

RANKED_SETS: Mapping[str, ProblemSet] = MappingProxyType({s.operator: s for s in (*COLLECTIVE_SETS, *SHARDED_SETS)})
"""The axis ``ranks`` is not listed by the sets: whoever draws a case adds the size of the world before it is mended."""


def ranked_set(operator: str) -> ProblemSet:
    """The cases of an operator for several ranks.

    Raises:
        UsageError: it has none.
    """
    found = RANKED_SETS.get(operator)
    if found is None:
        raise UsageError(f"operator {operator!r} has no cases for several ranks; {', '.join(RANKED_SETS)} have")
    return found
