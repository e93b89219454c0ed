"""Cases that fresh seeds found: what they showed is mended and stays so."""

from __future__ import annotations

from pathlib import Path

import pytest

from polyaccel_conformance.bench import Bench
from polyaccel_conformance.casefile import CaseFile
from polyaccel_conformance.check import run_case
from polyaccel_conformance.problems.registry import PROBLEM_SETS
from polyaccel_conformance.workers.worker import checks_named, open_bench

FOUND = sorted((Path(__file__).parent / "found").glob("*.json"))


@pytest.fixture(scope="module")
def bench() -> Bench:
    return open_bench(CaseFile.read(FOUND[0]).subject, 0)[0]


@pytest.mark.parametrize("path", FOUND, ids=lambda path: path.stem)
def test_a_case_that_once_failed_passes(path: Path, bench: Bench) -> None:
    file = CaseFile.read(path)
    problem = PROBLEM_SETS[file.case.operator].problem(file.case)
    result = run_case(bench, problem, checks_named([file.failure.check]))
    assert not result.failures
    assert result.checks == (file.failure.check,)
    assert dict(result.digests).items() >= dict(file.digests).items()
