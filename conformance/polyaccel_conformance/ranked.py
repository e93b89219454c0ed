"""The part of a run that needs several ranks: one world size after the other, each on a pool of ranks."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from polyaccel_conformance.case import Case
from polyaccel_conformance.check import CaseResult, Failure
from polyaccel_conformance.errors import ConformanceError
from polyaccel_conformance.multi.identity import RankIdentity
from polyaccel_conformance.problem import ProblemSet
from polyaccel_conformance.profiles import Profile
from polyaccel_conformance.results import RunHeader
from polyaccel_conformance.schedule import OfRanks, Scheduled, countable, drawn, fixed
from polyaccel_conformance.selection import Selects
from polyaccel_conformance.subject import Subject
from polyaccel_conformance.tally import Tally
from polyaccel_conformance.workers.pool import HANG
from polyaccel_conformance.workers.process import ForkServer

CHECK = "comm.ranks"
MAX_HANGS = 3
"""Cases of one operator that may hang before its remaining cases are left out."""


class RankedCases:
    """Cases of 2 to ``header.devices`` ranks."""

    def __init__(
        self,
        subject: Subject,
        header: RunHeader,
        profile: Profile,
        selects: Selects,
        server: ForkServer,
        *,
        given: Sequence[Case] | None = None,
        corpus: bool = True,
    ) -> None:
        from polyaccel_conformance.multi.ranks import RankPool

        self.incomplete = ""
        self._known: set[int] = set()
        self._header, self._profile, self._selects = header, profile, selects
        self._given, self._corpus = given, corpus
        self._pools = {
            world: RankPool(subject, world, checks=header.checks, case_timeout=profile.timeout, server=server)
            for world in range(2, header.devices + 1)
        }

    def results(
        self, known: frozenset[str], tally: Tally, deadline: float | None
    ) -> Iterator[tuple[Scheduled, CaseResult]]:
        """Every case that is not ``known``, as it is done."""
        plan = {world: self._cases(world) for world in self._pools}
        for items in plan.values():
            for item in items:
                tally.plan(item.case.operator)
        hung: Counter[str] = Counter()
        for world, items in plan.items():
            for item in items:
                if item.case.key in known:
                    continue
                if deadline is not None and time.monotonic() >= deadline:
                    self.incomplete = "the budget was spent among the cases of several ranks; --resume goes on"
                    return
                if hung[item.case.operator] >= MAX_HANGS:
                    # The others are left out: each would cost as much time again.
                    continue
                result = self.run(item.case)
                hung[item.case.operator] += any(failure.cause == HANG for failure in result.failures)
                yield item, result
            # One world at a time holds processes; a control opens its own again.
            self._pools[world].close()

    def controls(self, tally: Tally) -> Mapping[str, str]:
        """Controls of the checks that only cases of several ranks ask."""
        if not self._pools or self.incomplete:
            return {}
        pool = self._pools[2]
        only = tally.asked(several=True) - tally.asked(several=False)
        found: dict[str, str] = {}
        for check in sorted(only & set(self._header.checks) - set(tally.controls)):
            try:
                found[check] = pool.control(check)
            except ConformanceError as error:
                found[check] = f"did not end: {error}"
        return found

    def newcomers(self) -> tuple[RankIdentity, ...]:
        """Who the ranks of each world are, told once for each world."""
        found: list[RankIdentity] = []
        for world, pool in self._pools.items():
            if pool.identities and world not in self._known:
                self._known.add(world)
                found += pool.identities
        return tuple(found)

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()

    def _cases(self, world: int) -> list[Scheduled]:
        if self._given is not None:
            return [Scheduled(phase="given", case=case) for case in self._given if case.ranks == world]
        items: list[Scheduled] = []
        for name, problems in self._sets().items():
            if name in self._header.operators:
                items += fixed(problems, ranks=world) if self._corpus or countable(problems) else ()
                items += drawn(problems, self._profile, self._header.seed, ranks=world)
        return [item for item in items if self._selects(item.case)]

    def _sets(self) -> Mapping[str, ProblemSet]:
        from polyaccel_conformance.multi.registry import RANKED_SETS

        return RANKED_SETS

    def run(self, case: Case) -> CaseResult:
        """One case, all ranks in lock-step; also while a failing one is made smaller."""
        try:
            return self._pools[case.ranks].run(case, self._header.checks)
        except ConformanceError as error:
            failure = Failure(check=CHECK, cause="ranks did not start", message=str(error))
            return CaseResult(case=case, failures=(failure,), checks=(), implementation="", kind="")

    def problems(self, case: Case) -> ProblemSet | None:
        """Where simpler cases of the same number of ranks come from."""
        found = self._sets().get(case.operator)
        return None if found is None else OfRanks(found, case.ranks)
