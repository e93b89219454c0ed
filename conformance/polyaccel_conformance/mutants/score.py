"""Runs of mutants: through the same runner as any backend's, each in fresh processes of a shared forkserver."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from polyaccel_conformance.case import Case
from polyaccel_conformance.draw import uniform
from polyaccel_conformance.multi.registry import RANKED_SETS
from polyaccel_conformance.mutants.mutant import Mutant
from polyaccel_conformance.problem import ProblemSet
from polyaccel_conformance.problems.registry import PROBLEM_SETS
from polyaccel_conformance.run_options import Options
from polyaccel_conformance.runner import run
from polyaccel_conformance.schedule import HEAVY, OfRanks
from polyaccel_conformance.subject import Subject
from polyaccel_conformance.workers.process import ForkServer

SHARE_CASES = 300
"""Uniformly drawn cases from which a mutant's share of failing ones is taken."""
SHARE_SEED = 1
NARROW = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What one run of a mutant found.

    Attributes:
        mutant: its name, or the host's for the host itself, which must have no kills.
        cases: how many ran; ``failing``: in how many some check failed.
        kills: failing cases by check.
        asked: checks that some case asked.
        seconds: wall clock.
    """

    mutant: str
    cases: int
    failing: int
    kills: Mapping[str, int] = field(default_factory=dict)
    asked: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def share(self) -> float:
        """Failing cases among all."""
        return self.failing / self.cases if self.cases else 0.0


def hunt(
    mutant: Mutant, server: ForkServer, *, seed: int = 0, corpus: bool = True, subject: Subject | None = None
) -> Score:
    """The whole quick list of what it changes, ended by the first failure of its check.

    Args:
        corpus: the fixed list and the drawn cases of ``quick``; without it the drawn cases of ``certify`` alone, which
            is the profile of fresh seeds.
        subject: another host with the mutant planted in it.
    """
    check = mutant.check
    profile = "quick" if corpus else "certify"
    options = Options(profile=profile, seed=seed, checks=(check,), stop_at=check, corpus=corpus)
    return _scored(mutant, options, server, subject)


def examine(mutant: Mutant, server: ForkServer, operators: Sequence[str] = ()) -> Score:
    """The whole quick list of what it changes, or of ``operators``, with every check, not ended early."""
    return _scored(mutant, Options(profile="quick", operators=tuple(operators)), server)


def uniform_share(mutant: Mutant, checks: Sequence[str], server: ForkServer) -> Score | None:
    """How many uniformly drawn cases fail one of ``checks``; None where cases are listed, not drawn."""
    given = [case for name in mutant.operators for case in _uniform(name, mutant)]
    if not given or not checks:
        return None
    return _scored(mutant, Options(profile="quick", checks=tuple(checks), given=tuple(given)), server)


def _uniform(operator: str, mutant: Mutant) -> list[Case]:
    """Cases of one rank, and of several where the mutant runs on several: half of each."""
    sets: list[tuple[ProblemSet, int]] = []
    if operator in PROBLEM_SETS:
        sets.append((PROBLEM_SETS[operator], 1))
    if operator in RANKED_SETS:
        sets += [(OfRanks(RANKED_SETS[operator], world), world) for world in range(2, mutant.devices + 1)]
    found: list[Case] = []
    for problems, world in sets:
        if problems.weight < HEAVY:
            each = SHARE_CASES // len(mutant.operators) // len(sets) // problems.weight
            found += uniform(problems, each, SHARE_SEED, limits={"ranks": world})
    return found


def _scored(mutant: Mutant, options: Options, server: ForkServer, subject: Subject | None = None) -> Score:
    """The run of a mutant: as ``options`` say, on its own operators unless they name others."""
    options = replace(
        options, operators=options.operators or mutant.operators, devices=mutant.devices, shrink=False, controls=False
    )
    result = run(subject or Subject(name=mutant.host, mutant=mutant.name), options, server=server)
    return Score(
        mutant=mutant.name,
        cases=result.cases,
        failing=sum(state.failed for state in result.operators),
        kills={state.check: state.failures for state in result.checks if state.failures},
        asked=tuple(state.check for state in result.checks if state.cases),
        seconds=result.seconds,
    )
