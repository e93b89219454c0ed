"""The minimal case: axis by axis towards each axis's first value, as long as the same failure stays.

Deterministic, and independent of how the case was found. Cases run in workers, so that crashes and hangs shrink too.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from polyaccel_conformance.case import Case, Choice
from polyaccel_conformance.check import CaseResult
from polyaccel_conformance.problem import ProblemSet

SIMPLE_SEEDS = (0, 1, 2)
BATCH = 2

Run = Callable[[Sequence[Case]], Sequence[CaseResult]]
"""Runs cases, at once where it can; results in the same order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shrunk:
    """The simplest failing case found, after ``tries`` others in ``seconds``."""

    result: CaseResult
    tries: int
    seconds: float


def shrink(
    problems: ProblemSet, failing: CaseResult, fails: Callable[[CaseResult], bool], run: Run, seconds: float
) -> Shrunk:
    """The simplest case for which ``fails`` still holds, as far as it is found within ``seconds``.

    A simpler case changes one axis towards its first value, or the seed; the result is minimal in that no such single
    change keeps the failure, unless time ran out.
    """
    started = time.monotonic()
    best, tries = failing, 0
    seen = {failing.case.key}
    progress = True
    while progress and time.monotonic() - started < seconds:
        progress = False
        waiting = simpler(problems, best.case)
        while batch := _next(waiting, seen):
            tries += len(batch)
            found = next((result for result in run(batch) if fails(result)), None)
            if found is not None:
                best, progress = found, True
                break
            if time.monotonic() - started >= seconds:
                break
    return Shrunk(result=best, tries=tries, seconds=time.monotonic() - started)


def cost(problems: ProblemSet, case: Case) -> int:
    """How far a case is from the simplest one; falls with every step of shrinking."""
    axes = problems.axes()
    values = case.axes()
    total = sum(_cost(listed, values[path]) for path, listed in axes.items() if path in values)
    return 2 * total + (case.seed not in SIMPLE_SEEDS)


def simpler(problems: ProblemSet, case: Case) -> Iterator[Case]:
    """Valid cases of lower cost, the boldest first."""
    axes = problems.axes()
    now = case.axes()
    own = {path: now[path] for path in axes if path in now}
    limit = cost(problems, case)
    for change in itertools.chain(_bold(axes, own), _careful(axes, own)):
        mended = problems.mend({**own, **change})
        if mended is None:
            continue
        candidate = Case.of(case.operator, {**now, **mended}, case.seed)
        if cost(problems, candidate) < limit:
            yield candidate
    if case.seed not in SIMPLE_SEEDS:
        for seed in SIMPLE_SEEDS:
            yield case.with_seed(seed)


def _bold(axes: Mapping[str, Sequence[Choice]], own: Mapping[str, Choice]) -> Iterator[dict[str, Choice]]:
    """Everything at once, then half of the axes, then each alone to its first value."""
    first = {path: axes[path][0] for path in own if own[path] != axes[path][0]}
    yield first
    paths = list(first)
    for part in (paths[: len(paths) // 2], paths[len(paths) // 2 :]):
        if len(part) > 1:
            yield {path: first[path] for path in part}
    for path in paths:
        yield {path: first[path]}


def _careful(axes: Mapping[str, Sequence[Choice]], own: Mapping[str, Choice]) -> Iterator[dict[str, Choice]]:
    """One axis to a simpler value, the simplest first."""
    for path, value in own.items():
        for smaller in _smaller(axes[path], value):
            yield {path: smaller}


def _smaller(listed: Sequence[Choice], value: Choice) -> Iterator[Choice]:
    limit = _cost(listed, value)
    choices = sorted((v for v in listed if _cost(listed, v) < limit), key=lambda v: _cost(listed, v))
    if isinstance(value, int) and not isinstance(value, bool) and isinstance(listed[0], int):
        # Halving, then single steps.
        low = listed[0]
        halves = [low + (value - low) * part // 16 for part in (1, 2, 4, 8, 12)]
        steps = [value - 1, value + 1]
        more = {v for v in (*halves, *steps) if v >= 0 and _cost(listed, v) < limit}
        yield from sorted({*choices, *more}, key=lambda v: (_cost(listed, v), str(v)))
        return
    yield from choices
    if isinstance(value, tuple):
        for place in range(len(value)):
            yield value[:place] + value[place + 1 :]
        for place, item in enumerate(value):
            for less in dict.fromkeys((0, 1, item // 2, item - 1)):
                if 0 <= less < item:
                    yield (*value[:place], less, *value[place + 1 :])


def _cost(listed: Sequence[Choice], value: Choice) -> int:
    first = listed[0] if listed else None
    if value == first and type(value) is type(first):
        return 0
    if isinstance(value, tuple):
        return 1 + len(value) + sum(abs(item) for item in value)
    if isinstance(value, int) and not isinstance(value, bool) and isinstance(first, int):
        return 1 + abs(value - first)
    for place, item in enumerate(listed):
        if item == value and type(item) is type(value):
            return place
    return 1 + len(listed)


def _next(candidates: Iterator[Case], seen: set[str]) -> list[Case]:
    """The next few cases that were not tried yet."""
    batch: list[Case] = []
    for case in candidates:
        if case.key in seen:
            continue
        seen.add(case.key)
        batch.append(case)
        if len(batch) == BATCH:
            break
    return batch
