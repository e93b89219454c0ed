"""Which cases a run consists of, operator by operator."""

from __future__ import annotations

import functools
import hashlib
import math
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from polyaccel_conformance.case import Case, Choice
from polyaccel_conformance.covering import covering, large
from polyaccel_conformance.draw import examples
from polyaccel_conformance.problem import Problem, ProblemSet
from polyaccel_conformance.profiles import Profile
from polyaccel_conformance.results import Phase
from polyaccel_conformance.selection import Selects

FEW = 16
"""Cases of a set that can be counted."""
WAITING = 4
"""Cases that wait for a timeout, of those drawn for an operator at one world size."""
RANKED, RANKED_SHARE = 25, 3
"""Cases of several ranks drawn for an operator: a third of the profile's at each world size, but not below 25."""
HEAVY = 100
"""The weight of a set from which on a case counts as slow, such as one of a whole model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheduled:
    """A case and the part of the run that it belongs to."""

    phase: Phase
    case: Case


class OfRanks(ProblemSet):
    """A set of cases for several ranks, at one world size."""

    def __init__(self, problems: ProblemSet, ranks: int) -> None:
        self.operator, self.weight = problems.operator, problems.weight
        self._problems, self._ranks = problems, ranks

    def axes(self) -> Mapping[str, Sequence[Choice]]:
        return {**self._problems.axes(), "ranks": (self._ranks,)}

    def ranges(self) -> Mapping[str, tuple[int, int]]:
        return self._problems.ranges()

    def mend(self, axes: dict[str, Choice]) -> dict[str, Choice] | None:
        return self._problems.mend(axes)

    def waits(self, case: Case) -> bool:
        return self._problems.waits(case)

    def problem(self, case: Case) -> Problem:
        return self._problems.problem(case)


def fixed(problems: ProblemSet, *, ranks: int = 1) -> tuple[Scheduled, ...]:
    """An operator's fixed list: pairwise, large sizes, then what the levels' required tables ask for beyond those.

    ``ranks``: the world size of every case.
    """
    return _fixed(problems, ranks)


@functools.cache
def _fixed(problems: ProblemSet, ranks: int) -> tuple[Scheduled, ...]:
    # Kept, since it is begun ahead, and runs of many mutants ask for it again and again.
    from polyaccel_conformance.levels.listed import listed_cases

    source = _at(problems, ranks)
    found: dict[str, Scheduled] = {}
    for case in covering(source, {"ranks": ranks}).cases:
        found.setdefault(case.key, Scheduled(phase="covering", case=case))
    for case in large(source):
        found.setdefault(case.key, Scheduled(phase="large", case=case))
    have = [item.case for item in found.values()]
    for case in listed_cases(source, have, ranks=ranks):
        found.setdefault(case.key, Scheduled(phase="large", case=case))
    return tuple(found.values())


def _at(problems: ProblemSet, ranks: int) -> ProblemSet:
    return problems if ranks == 1 else OfRanks(problems, ranks)


def begin_lists(operators: Sequence[str]) -> None:
    """Begin to work out the fixed lists of these operators, or of all: while the workers start, which takes as long."""

    def work_out() -> None:
        from polyaccel_conformance.problems.registry import PROBLEM_SETS

        for name in operators or PROBLEM_SETS:
            if name in PROBLEM_SETS:
                fixed(PROBLEM_SETS[name])

    threading.Thread(target=work_out, daemon=True).start()


def ahead(chunks: Iterator[tuple[Scheduled, ...]]) -> Iterator[tuple[Scheduled, ...]]:
    """The same, each worked out while the one before it runs."""
    thread = ThreadPoolExecutor(max_workers=1)
    try:
        coming = thread.submit(next, chunks, None)
        while (chunk := coming.result()) is not None:
            coming = thread.submit(next, chunks, None)
            yield chunk
    finally:
        thread.shutdown(wait=False)


def drawn(problems: ProblemSet, profile: Profile, seed: int, *, ranks: int = 1) -> tuple[Scheduled, ...]:
    """A profile's further cases of an operator under the run's seed, at one world size."""
    digest = hashlib.sha256(f"{seed}:{problems.operator}:{ranks}".encode()).digest()
    base = int.from_bytes(digest[:4], "little")
    examples = profile.examples
    if ranks > 1:
        # There are several world sizes, and a case takes as many processes as it has ranks.
        examples = max(examples // RANKED_SHARE, min(examples, RANKED))
    cases = _examples(problems, examples // problems.weight, base, profile.scale, ranks)
    return tuple(Scheduled(phase="drawn", case=case) for case in cases)


@functools.lru_cache(maxsize=64)
def _examples(problems: ProblemSet, count: int, base: int, scale: float, ranks: int) -> tuple[Case, ...]:
    # Runs of many mutants ask for the same ones again and again.
    source = _at(problems, ranks)
    cases = examples(source, count, base, scale=scale, limits={"ranks": ranks})
    seen: Counter[str] = Counter()
    turn: dict[str, int] = {}
    for case in cases:
        if source.waits(case):
            kind = str(sorted(case.structure.items()))
            turn[case.key] = seen[kind]
            seen[kind] += 1
    # The first of every kind, then the second of every kind: four of one kind would leave another out.
    kept = sorted(turn, key=turn.__getitem__)[:WAITING]
    return tuple(case for case in cases if case.key not in turn or case.key in kept)


def countable(problems: ProblemSet) -> bool:
    """Whether a set has so few or so slow cases that its list is all there is to it: what is drawn is listed as well,
    or a run has time for a single one."""
    few = math.prod(len(values) for values in problems.axes().values()) <= FEW
    return not problems.ranges() and (few or problems.weight >= HEAVY)


@dataclass(frozen=True, slots=True)
class Schedule:
    """All cases of a run: every operator's fixed list first, then every operator's drawn cases.

    Drawing takes as long as running, so that it happens chunk by chunk.
    """

    sets: Mapping[str, ProblemSet]
    profile: Profile
    seed: int
    selects: Selects
    given: tuple[Case, ...] | None = None
    corpus: bool = True

    def chunks(self) -> Iterator[tuple[Scheduled, ...]]:
        """Groups after which new failures are shrunk and shown."""
        if self.given is not None:
            yield tuple(Scheduled(phase="given", case=case) for case in self.given)
            return
        first: list[Scheduled] = []
        for problems in self.sets.values():
            if self.corpus or countable(problems):
                first += self._selected(fixed(problems))
        yield tuple(first)
        for names in self._batches():
            chunk: list[Scheduled] = []
            for name in names:
                chunk += self._selected(drawn(self.sets[name], self.profile, self.seed))
            yield tuple(chunk)

    def _batches(self) -> Iterator[list[str]]:
        """Operators whose drawn cases make one chunk: few chunks where the profile is short."""
        names = list(self.sets)
        size = max(200 // max(self.profile.examples, 1), 1)
        for start in range(0, len(names), size):
            yield names[start : start + size]

    def _selected(self, items: Sequence[Scheduled]) -> list[Scheduled]:
        return [item for item in items if self.selects(item.case)]

    def expected(self, fixed_cases: int) -> int:
        """About how many cases there will be, once the fixed ones are known."""
        drawn_cases = sum(self.profile.examples // problems.weight for problems in self.sets.values())
        return fixed_cases + drawn_cases if self.given is None else fixed_cases
