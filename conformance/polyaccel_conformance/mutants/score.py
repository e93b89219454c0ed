"""Which checks kill which mutants: every mutant's cases, run by workers as any backend's are."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from polyaccel_conformance.mutants.catalogue import MUTANTS
from polyaccel_conformance.mutants.mutant import Mutant
from polyaccel_conformance.problems.registry import PROBLEM_SETS
from polyaccel_conformance.profiles import profile_of
from polyaccel_conformance.results import result_from_json
from polyaccel_conformance.schedule import Scheduled, drawn, fixed
from polyaccel_conformance.subject import Subject
from polyaccel_conformance.workers.pool import Job, Pool
from polyaccel_conformance.workers.process import ForkServer

HOST = "cpu"
CORPUS, DRAWN = "corpus", "drawn"


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What the checks found of one mutant.

    Attributes:
        mutant: its name, or the host's for the host itself, which must have no kills.
        cases: how many ran; ``failing``: in how many some check failed.
        kills: failing cases by check.
        seconds: wall clock.
    """

    mutant: str
    cases: int
    failing: int
    kills: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def share(self) -> float:
        """Failing cases among all."""
        return self.failing / self.cases if self.cases else 0.0


def score(
    mutant: Mutant | None,
    checks: Sequence[str],
    operators: Sequence[str],
    server: ForkServer,
    *,
    seed: int | None = None,
    stop: bool = False,
) -> Score:
    """Run the cases of ``operators`` against a mutant, or the host for None, in fresh processes.

    Args:
        seed: of drawn cases, which then run instead of the fixed list.
        stop: end at the first failure.
    """
    began = time.monotonic()
    subject = Subject(name=HOST, mutant="" if mutant is None else mutant.name)
    kills: Counter[str] = Counter()
    cases = failing = 0
    with Pool(subject, server=server) as pool:
        for answer in pool.run(_jobs(operators, checks, seed)):
            cases += 1
            found = {answer.died} if answer.died else set()
            if "result" in answer.reply:
                found = {failure.check for failure in result_from_json(answer.reply["result"]).failures}
            kills.update(found)
            failing += bool(found)
            if stop and found:
                break
    name = HOST if mutant is None else mutant.name
    return Score(mutant=name, cases=cases, failing=failing, kills=dict(kills), seconds=time.monotonic() - began)


def _jobs(operators: Sequence[str], checks: Sequence[str], seed: int | None) -> Iterator[Job]:
    profile = profile_of("quick")
    for operator in operators:
        problems = PROBLEM_SETS[operator]
        listed: tuple[Scheduled, ...] = fixed(problems) if seed is None else drawn(problems, profile, seed)
        for item in listed:
            if item.case.ranks == 1:
                request = {"do": "case", "case": item.case.to_json(), "checks": list(checks)}
                yield Job(name=item, request=request, seconds=profile.timeout)


def sole_killers(scores: Sequence[Score]) -> dict[str, list[str]]:
    """By check, the mutants that no other check kills."""
    found: dict[str, list[str]] = {}
    for one in scores:
        if len(one.kills) == 1:
            found.setdefault(next(iter(one.kills)), []).append(one.mutant)
    return found


def matrix(scores: Sequence[Score]) -> str:
    """The kill matrix as Markdown: failing cases by mutant and check."""
    checks = sorted({check for one in scores for check in one.kills})
    lines = ["| mutant | cases | failing |" + "".join(f" {check} |" for check in checks)]
    lines.append("|---|---|---|" + "---|" * len(checks))
    for one in scores:
        cells = "".join(f" {one.kills.get(check, '')} |" for check in checks)
        lines.append(f"| {one.mutant} | {one.cases} | {one.share:.1%} |{cells}")
    sole = sole_killers(scores)
    lines += ["", "Mutants that one check alone kills:", ""]
    lines += [f"- `{check}`: {', '.join(sole[check])}" for check in sorted(sole)]
    return "\n".join(lines) + "\n"


def chosen(names: Sequence[str]) -> list[Mutant]:
    """The mutants of these names, all for none. Raises KeyError for a name that is none."""
    return [MUTANTS[name] for name in names] if names else list(MUTANTS.values())
