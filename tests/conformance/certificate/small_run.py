"""A results log as a run writes it, from cases executed in this process."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from polyaccel.backend import load
from polyaccel.backend.levels import LEVELS
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.certificate.environment import environment
from polyaccel_conformance.certificate.sources import contract_digest
from polyaccel_conformance.check import CaseResult, Failure, run_case
from polyaccel_conformance.checks.registry import CHECKS
from polyaccel_conformance.log import ResultsLog
from polyaccel_conformance.problems.registry import PROBLEM_SETS
from polyaccel_conformance.profiles import PROFILES
from polyaccel_conformance.results import RunHeader
from polyaccel_conformance.schedule import drawn, fixed
from polyaccel_conformance.subject import Subject

OPERATORS = ("device.copy_paths", "select_rows")
ASKED = ("device.copy_paths", "values.exact")
# One device: what needs two or an asynchronous one cannot be asked.
IMPOSSIBLE = tuple(name for name in LEVELS["L0"].checks if name not in ASKED)
FAILURE = Failure(check="values.exact", cause="wrong value", message="planted")


def write_log(
    path: Path,
    *,
    ended: bool = True,
    change: Callable[[CaseResult], CaseResult] = lambda result: result,
    selection: str = "",
    sources: Mapping[str, str] | None = None,
) -> None:
    """Every case of :data:`OPERATORS` on the CPU backend; ``change`` is applied to each result."""
    backend = load("cpu")
    bench = Bench(backend)
    header = RunHeader(
        subject=Subject(name="cpu"),
        profile="quick",
        seed=0,
        checks=(*ASKED, *IMPOSSIBLE),
        operators=OPERATORS,
        selection=selection,
        environment={**environment("cpu", backend), **(sources or {})},
        contract="1.0",
        started="2026-06-01T12:00:00+00:00",
    )
    checks = [CHECKS[name] for name in ASKED]
    with ResultsLog(path) as log:
        log.header(header)
        for name in ASKED:
            log.write("control", {"check": name, "control": "failed as it must"})
        for name in IMPOSSIBLE:
            log.write("control", {"check": name, "control": "impossible here"})
        count = 0
        for operator in OPERATORS:
            problems = PROBLEM_SETS[operator]
            for item in (*fixed(problems), *drawn(problems, PROFILES["quick"], 0)):
                result = run_case(bench, problems.problem(item.case), checks)
                log.case(item.phase, change(result))
                count += 1
        if ended:
            log.write("end", {"cases": count, "seconds": 1.0})


def failing(result: CaseResult) -> CaseResult:
    """The same case of ``select_rows`` with a failure; others as they are."""
    return replace(result, failures=(FAILURE,)) if result.case.operator == "select_rows" else result


def rewritten(source: Path, target: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    """The bundle with its files changed, and nothing else."""
    with tarfile.open(source) as archive:
        files = {}
        for entry in archive:
            content = archive.extractfile(entry)
            assert content is not None
            files[entry.name] = content.read()
    change(files)
    with tarfile.open(target, "w:xz") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return target


def edit_json(files: dict[str, bytes], name: str, change: Callable[[Any], None]) -> None:
    """Change a JSON file of a bundle."""
    value = json.loads(files[name])
    change(value)
    files[name] = (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def edit_lines(files: dict[str, bytes], name: str, change: Callable[[dict[str, Any]], dict[str, Any] | None]) -> None:
    """Change or drop lines of a JSON Lines file of a bundle."""
    lines = [change(json.loads(line)) for line in files[name].decode().splitlines()]
    files[name] = "".join(json.dumps(line) + "\n" for line in lines if line is not None).encode()


__all__ = ["contract_digest", "edit_json", "edit_lines", "failing", "rewritten", "write_log"]
