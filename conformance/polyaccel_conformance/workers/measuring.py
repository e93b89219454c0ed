"""Measuring what many cases share: jobs of their own, before these, on one worker for all."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from polyaccel_conformance.case import Case
from polyaccel_conformance.checks.numerics import NUMERICS_CHECKS
from polyaccel_conformance.probes.shared import Shared, shared_probe
from polyaccel_conformance.workers.pool import Job, Pool

SECONDS = 30.0
"""Patience with one of these; a case that has to measure it itself has the profile's."""


@dataclass(slots=True)
class SharedProbes:
    """What a run has measured so far. What failed is left to the first case that asks, which meets it again."""

    _known: dict[Shared, Any] = field(default_factory=dict)

    def measure(self, pool: Pool, cases: Iterable[Case], checks: Collection[str]) -> None:
        """All that these cases share and that is not known yet, if a check asks for it."""
        if NUMERICS_CHECKS.keys().isdisjoint(checks):
            return
        asked = dict.fromkeys(shared_probe(case) for case in cases)
        new = [shared for shared in asked if shared is not None and shared not in self._known]
        self._known |= dict.fromkeys(new)
        for answer in pool.run(
            Job(name=(name, dtype), request={"do": "measure", "operator": name, "dtype": dtype}, seconds=SECONDS)
            for name, dtype in new
        ):
            assert isinstance(answer.job.name, tuple)
            self._known[answer.job.name] = answer.reply.get("measured")

    def of(self, case: Case) -> dict[str, Any]:
        """What a request for this case says of it."""
        shared = shared_probe(case)
        found = None if shared is None else self._known.get(shared)
        return {} if found is None else {"measured": found}
