"""The suite's cases and the lines of the package that each of them executes, kept in a file from run to run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from polyaccel_conformance.case import Case
from polyaccel_conformance.checks.registry import CHECKS
from polyaccel_conformance.mutation.edit import Edit
from polyaccel_conformance.mutation.install import digests
from polyaccel_conformance.mutation.trace import TARGET
from polyaccel_conformance.problems.registry import PROBLEM_SETS
from polyaccel_conformance.profiles import profile_of
from polyaccel_conformance.schedule import HEAVY, drawn, fixed
from polyaccel_conformance.subject import Subject
from polyaccel_conformance.workers.process import ForkServer

PROFILE, SEED = "quick", 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """``cases``: fixed ones of every operator, then drawn ones. ``by_line``: indices of the cases that execute it.
    ``failing``: cases that fail on the unchanged package, with what fails; they say nothing of mutants."""

    cases: tuple[Case, ...]
    by_line: Mapping[tuple[str, int], frozenset[int]]
    failing: tuple[str, ...] = ()

    def of(self, edit: Edit) -> list[Case]:
        """The cases that execute the edit's statement; operators take turns, each in the order of its list."""
        found: set[int] = set()
        for line in range(edit.first, edit.last + 1):
            found |= self.by_line.get((edit.file, line), frozenset())
        rank: dict[int, tuple[int, int]] = {}
        counts: dict[str, int] = {}
        for index in sorted(found):
            operator = self.cases[index].operator
            rank[index] = (counts.get(operator, 0), index)
            counts[operator] = counts.get(operator, 0) + 1
        return [self.cases[index] for index in sorted(found, key=rank.__getitem__)]


def cases() -> Iterator[Case]:
    """What one run of the profile asks of one device, whole models aside."""
    sets = [problems for problems in PROBLEM_SETS.values() if problems.weight < HEAVY]
    for problems in sets:
        yield from (item.case for item in fixed(problems))
    for problems in sets:
        yield from (item.case for item in drawn(problems, profile_of(PROFILE), SEED))


def measure(subject: Subject, server: ForkServer, found: Sequence[Case]) -> Coverage:
    """Run every case with every check on the unchanged package."""
    arguments = {"subject": subject.to_json(), "checks": list(CHECKS)}
    process, connection = server.start(TARGET, arguments)
    by_line: dict[tuple[str, int], set[int]] = {}
    failing: list[str] = []
    try:
        for index, case in enumerate(found):
            connection.send_bytes(json.dumps(case.to_json()).encode())
            answer = json.loads(connection.recv_bytes())
            if answer["failures"]:
                failing.append(f"{case.operator} {case.key}: {', '.join(answer['failures'])}")
                continue
            for name, line in answer["lines"]:
                by_line.setdefault((name, line), set()).add(index)
    finally:
        connection.close()
        process.wait(5.0)
    frozen = {line: frozenset(indices) for line, indices in by_line.items()}
    return Coverage(cases=tuple(found), by_line=frozen, failing=tuple(failing))


def kept(path: Path, subject: Subject, server: ForkServer) -> Coverage:
    """What ``path`` holds for the sources and the suite's cases as they are; measured and written there else."""
    found = list(cases())
    state = {**digests(), "cases": hashlib.sha256("".join(case.key for case in found).encode()).hexdigest()[:16]}
    if path.exists():
        value = json.loads(path.read_text())
        if value["state"] == state:
            lines = {(name, line): frozenset(indices) for name, line, indices in value["lines"]}
            return Coverage(cases=tuple(found), by_line=lines, failing=tuple(value["failing"]))
    coverage = measure(subject, server, found)
    rows = [[name, line, sorted(indices)] for (name, line), indices in sorted(coverage.by_line.items())]
    path.write_text(json.dumps({"state": state, "lines": rows, "failing": coverage.failing}))
    return coverage
