"""Series of runs: every mutant by its check, by all checks, on fresh seeds, in the whole of quick, around a backend."""

from __future__ import annotations

import datetime
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from polyaccel_conformance.mutants.catalogue import HEALTHY, MUTANTS
from polyaccel_conformance.mutants.choice import by_date, portable_to
from polyaccel_conformance.mutants.mutant import Mutant
from polyaccel_conformance.mutants.page import page, problems, sole_killers
from polyaccel_conformance.mutants.records import Records
from polyaccel_conformance.mutants.score import Score, examine, hunt, uniform_share
from polyaccel_conformance.subject import Subject
from polyaccel_conformance.workers.process import ForkServer

AROUND = 10
"""Mutants that a certificate's run plants around the backend's own operators."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a series came to. ``missed``: mutants that their check did not find, and whatever else is wrong."""

    scores: tuple[Score, ...]
    missed: tuple[str, ...]

    @property
    def summary(self) -> str:
        seconds = [score.seconds for score in self.scores] or [0.0]
        found = f"{len(self.scores) - len(self.missed)} of {len(self.scores)} mutants found"
        return f"{found}; {sum(seconds):.0f} s, median {statistics.median(seconds):.1f} s, longest {max(seconds):.1f} s"


def hunts(mutants: Sequence[Mutant], server: ForkServer, say: Say, *, seed: int = 0) -> Outcome:
    """Each until its check has found it."""
    return _outcome([_told(mutant, hunt(mutant, server, seed=seed), say) for mutant in mutants], mutants)


def on_seeds(
    mutants: Sequence[Mutant], seeds: Sequence[int], server: ForkServer, say: Say, records: Records
) -> Outcome:
    """The same on drawn cases alone, for every seed. What the records hold is not run again."""
    scores: list[Score] = []
    missed: list[str] = []
    for mutant in mutants:
        for seed in seeds:
            known = records.of(mutant).seeds
            score = known.get(str(seed))
            if score is None:
                score = _told(mutant, hunt(mutant, server, seed=seed, corpus=False), say, f" seed {seed}")
                records.update(mutant, seeds={**known, str(seed): score})
            scores.append(score)
            if mutant.check not in score.kills:
                missed.append(f"{mutant.name} on seed {seed}")
    return Outcome(scores=tuple(scores), missed=tuple(missed))


def matrix(mutants: Sequence[Mutant], path: Path, server: ForkServer, say: Say, *, again: bool) -> list[str]:
    """All checks on all cases; writes the page and the records beside it. What is not as it must be.

    Args:
        again: run these mutants whatever the records hold.
    """
    from polyaccel_conformance.checks.registry import CHECKS

    records = Records(path.with_suffix(".json"))
    records.keep(MUTANTS)
    shown = sole_killers({mutant.name: records.of(mutant) for mutant in MUTANTS.values()})
    # First those whose check has not been shown to find anything alone.
    for mutant in sorted((m for m in mutants if m.name in MUTANTS), key=lambda m: m.check in shown):
        record = records.of(mutant)
        if again or record.full is None:
            full = examine(mutant, server)
            record = records.update(mutant, full=full)
            kills = ", ".join(f"{check} {count}" for check, count in full.kills.items()) or "nothing"
            say(f"{mutant.name:36} {full.failing:4} of {full.cases:4} cases fail, {full.seconds:6.1f} s: {kills}")
        if again or record.hunt is None:
            record = records.update(mutant, hunt=hunt(mutant, server))
        if mutant.narrow and record.full is not None and (again or record.uniform is None):
            records.update(mutant, uniform=uniform_share(mutant, tuple(record.full.kills), server))
    asked = [mutant.name for mutant in mutants]
    for name, healthy in HEALTHY.items():
        if name in asked if again else name not in records.hosts:
            score = examine(healthy, server)
            records.host(name, score)
            say(f"{name:36} {score.failing:4} of {score.cases:4} cases fail, {score.seconds:6.1f} s")
    path.write_text(page(MUTANTS, records, tuple(CHECKS), HEALTHY), encoding="utf-8")
    return problems(MUTANTS, records, tuple(CHECKS), HEALTHY)


def whole_of_quick(count: int, date: datetime.date, server: ForkServer, say: Say) -> Outcome:
    """``count`` mutants chosen by date: everything that quick has, all checks, nothing ended early."""
    from polyaccel_conformance.multi.registry import RANKED_SETS
    from polyaccel_conformance.problems.registry import PROBLEM_SETS

    scores: list[Score] = []
    mutants = by_date(list(MUTANTS.values()), count, date)
    for mutant in mutants:
        operators = [*PROBLEM_SETS, *(name for name in RANKED_SETS if mutant.devices > 1 and name not in PROBLEM_SETS)]
        scores.append(_told(mutant, examine(mutant, server, operators), say))
    return _outcome(scores, mutants)


def around(subject: Subject, date: datetime.date, server: ForkServer, say: Say, *, count: int = AROUND) -> Outcome:
    """``count`` mutants, chosen by date, planted around the subject's own operators, each until its check has found it.

    Raises:
        UsageError, BackendUnavailable: the subject cannot be opened.
    """
    backend = subject.open()
    try:
        mutants = by_date(portable_to(backend), count, date)
    finally:
        backend.close()
    scores = [
        _told(mutant, hunt(mutant, server, subject=replace(subject, mutant=mutant.name)), say) for mutant in mutants
    ]
    return _outcome(scores, mutants)


def _told(mutant: Mutant, score: Score, say: Say, where: str = "") -> Score:
    verdict = "found by" if mutant.check in score.kills else "SURVIVES"
    say(f"{mutant.name:36} {verdict} {mutant.check:28} {score.cases:4} cases {score.seconds:6.1f} s{where}")
    return score


def _outcome(scores: Sequence[Score], mutants: Sequence[Mutant]) -> Outcome:
    missed = [mutant.name for mutant, score in zip(mutants, scores, strict=True) if mutant.check not in score.kills]
    return Outcome(scores=tuple(scores), missed=tuple(missed))
