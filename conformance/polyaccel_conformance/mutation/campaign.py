"""Every mutant against the cases that execute it, until one fails."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice, zip_longest
from pathlib import Path

from polyaccel_conformance.case import Case
from polyaccel_conformance.checks.registry import CHECKS
from polyaccel_conformance.errors import ConformanceError
from polyaccel_conformance.multi.ranks import RankPool
from polyaccel_conformance.mutation.coverage import Coverage
from polyaccel_conformance.mutation.edit import Edit, file_of
from polyaccel_conformance.mutation.install import digests
from polyaccel_conformance.mutation.subject import named
from polyaccel_conformance.mutation.unit import first_failure, unit_tests_of
from polyaccel_conformance.problems.collectives import COLLECTIVE_SETS
from polyaccel_conformance.results import result_from_json
from polyaccel_conformance.schedule import fixed
from polyaccel_conformance.subject import Subject
from polyaccel_conformance.workers.pool import Answer, Job, Pool
from polyaccel_conformance.workers.process import ForkServer

TIMEOUT = 30.0
"""Seconds after which a case hangs: some hundred times what the slowest takes."""
RANKED_FILES = ("communicator.py", "operators.py")
"""Files that cases of several ranks execute as well."""
WORLDS = (2, 3)
FIRST = ("values.", "storage.")
"""Checks that are asked first of all cases: they compare numbers, and kill most."""
OPEN = "open"
"""Instead of a check: the ranks did not come together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a mutant.

    Attributes:
        killed: by which check, or how its process ended; empty for a survivor.
        operator: whose case it was.
        cases: runs of cases until then.
        seconds: wall clock.
    """

    killed: str
    operator: str = ""
    cases: int = 0
    seconds: float = 0.0


class Campaign:
    """Runs mutants in fresh processes. A case that fails is run without the change too; if it passes there, it kills.

    Attributes:
        unsound: cases that failed there too.

    Args:
        healthy: what opens the package as it is.
        limit: cases that a mutant is asked at most with the checks beside :data:`FIRST`, and with each number of ranks;
            0 for all that execute it.
        tests: folder of the package's unit tests, asked last of all.
    """

    def __init__(
        self,
        healthy: Subject,
        coverage: Coverage,
        server: ForkServer,
        *,
        limit: int = 0,
        tests: Path | None = None,
    ) -> None:
        self._digests = digests()
        self._healthy = healthy
        self._coverage = coverage
        self._server = server
        self._limit = limit
        self._tests = tests
        self._sound: dict[str, bool] = {}
        self.unsound: list[str] = []
        self._control = Pool(healthy, count=1, server=server)
        self._ranks = {world: RankPool(healthy, world, server=server, case_timeout=TIMEOUT) for world in WORLDS}

    def close(self) -> None:
        """End the healthy processes."""
        self._control.close()
        for ranks in self._ranks.values():
            ranks.close()

    def run(self, edit: Edit) -> Outcome:
        """The first kill: by numbers, then by any other check, then among ranks, then by unit tests.

        Raises:
            ConformanceError: the mutant cannot be made, or the sources are being edited.
        """
        began = time.monotonic()
        subject = replace(self._healthy, name=named(edit, self._digests[edit.file]))
        found = Outcome(killed="")
        cases = self._coverage.of(edit)
        first = [name for name in CHECKS if name.startswith(FIRST)]
        rest = [name for name in CHECKS if not name.startswith(FIRST)]
        if cases:
            found = self._alone(subject, chain(_jobs(cases, first), _jobs(cases[: self._limit or None], rest)))
        if not found.killed and edit.file in RANKED_FILES:
            found = self._ranked(subject, found.cases)
        if not found.killed and self._tests is not None:
            found = replace(found, killed=self._unit(edit.file, subject.name))
        return replace(found, seconds=round(time.monotonic() - began, 2))

    def _alone(self, subject: Subject, jobs: Iterator[Job]) -> Outcome:
        ran = 0
        with Pool(subject, count=1, server=self._server) as pool:
            for answer in pool.run(jobs):
                ran += 1
                found = _failure(answer)
                if not found:
                    continue
                again = _failure(self._control.ask(answer.job))
                if not again:
                    return Outcome(killed=found, operator=str(answer.job.name), cases=ran)
                self.unsound.append(f"{again}: {answer.job.request['case']}")
        return Outcome(killed="", cases=ran)

    def _unit(self, file: str, name: str) -> str:
        assert self._tests is not None
        tests = unit_tests_of(file, self._tests)
        found = first_failure(name, tests, self._server)
        if found and file not in self._sound:
            self._sound[file] = not first_failure(self._healthy.name, tests, self._server)
            if not self._sound[file]:
                self.unsound.append(f"unit tests of {file}")
        return found if self._sound.get(file, True) else ""

    def _ranked(self, subject: Subject, ran: int) -> Outcome:
        for world in WORLDS:
            with RankPool(subject, world, server=self._server, timeout=TIMEOUT, case_timeout=TIMEOUT) as pool:
                for case in islice(_ranked_cases(world), self._limit or None):
                    ran += 1
                    try:
                        failures = pool.run(case).failures
                        found = failures[0].check if failures else ""
                    except ConformanceError as error:
                        if "UsageError" in str(error):
                            raise
                        found = OPEN
                    if found and self._ranks[world].run(case).passed:
                        return Outcome(killed=found, operator=case.operator, cases=ran)
                    if found:
                        self.unsound.append(f"{found}: {case.to_json()}")
        return Outcome(killed="", cases=ran)


def _failure(answer: Answer) -> str:
    """The first check that failed, or how the worker ended."""
    if answer.died or "result" not in answer.reply:
        return answer.died or f"error: {answer.reply['error']['type']}"
    failures = result_from_json(answer.reply["result"]).failures
    return failures[0].check if failures else ""


def _jobs(cases: Sequence[Case], checks: Sequence[str]) -> Iterator[Job]:
    for case in cases:
        request = {"do": "case", "case": case.to_json(), "checks": list(checks)}
        yield Job(name=case.operator, request=request, seconds=TIMEOUT)


def _ranked_cases(world: int) -> Iterator[Case]:
    """Collectives take turns: each shows another part of a communicator. What calls them shows no more of it."""
    lists = [[item.case for item in fixed(s, ranks=world)] for s in COLLECTIVE_SETS]
    return (case for case in chain.from_iterable(zip_longest(*lists)) if case is not None)


class State:
    """Outcomes in a JSON file: what was run is not run again as long as its source file is the same.

    Args:
        path: None keeps nothing.
        digests: of the source files as they are, by name.
    """

    def __init__(self, path: Path | None, digests: Mapping[str, str]) -> None:
        self._path, self._digests = path, dict(digests)
        self.outcomes: dict[str, Outcome] = {}
        if path is not None and path.exists():
            value = json.loads(path.read_text())
            same = {name for name, digest in value["sources"].items() if digests.get(name) == digest}
            for key, outcome in value["outcomes"].items():
                if file_of(key) in same:
                    self.outcomes[key] = Outcome(**outcome)

    def add(self, edit: Edit, outcome: Outcome) -> None:
        self.outcomes[edit.key] = outcome
        if self._path is not None:
            found: Mapping[str, object] = {key: asdict(value) for key, value in self.outcomes.items()}
            value = {"sources": self._digests, "outcomes": found}
            # A run that is ended here leaves what it had.
            whole = self._path.with_suffix(".part")
            whole.write_text(json.dumps(value, indent=0))
            whole.replace(self._path)

    def forget_survivors(self) -> None:
        """Run them again: the suite has changed since."""
        self.outcomes = {key: outcome for key, outcome in self.outcomes.items() if outcome.killed}


def run(
    campaign: Campaign,
    edits: Sequence[Edit],
    state: State,
    deadline: float | None,
    watch: Callable[[Edit, Outcome], None],
) -> bool:
    """Run what ``state`` does not have yet. Whether all of it was done before the deadline (monotonic clock)."""
    for edit in edits:
        if edit.key in state.outcomes:
            continue
        if deadline is not None and time.monotonic() >= deadline:
            return False
        outcome = campaign.run(edit)
        state.add(edit, outcome)
        watch(edit, outcome)
    return True
