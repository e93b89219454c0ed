"""Runs with several ranks: broken off and taken up, and only what failed once more."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from polyaccel_conformance.errors import ExitCode
from polyaccel_conformance.log import read_log
from polyaccel_conformance.results import FailureGroup, RunResult
from polyaccel_conformance.runner import RESULTS, Options, Watch
from polyaccel_conformance.runner import run as run_suite
from polyaccel_conformance.workers.process import ForkServer
from tests.conformance.multi.subjects import subject

OF_RANKS = Options(
    profile="quick",
    operators=("all_reduce", "silu_and_mul"),
    checks=("values.exact", "values.bound"),
    selection="(silu_and_mul and dims.tokens=2) or (all_reduce and data=digits and dtype=float32)",
    devices=2,
    shrink=False,
)


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    found = ForkServer()
    yield found
    found.close()


def run(named: str, options: Options, server: ForkServer, watch: Watch | None = None) -> RunResult:
    return run_suite(subject(named), options, watch, server)


class Interrupting:
    """Ctrl-C after some cases."""

    def __init__(self, after: int) -> None:
        self._after = after

    def progress(self, done: int, expected: int, failed: int, now: str) -> None:
        if done == self._after:
            raise KeyboardInterrupt

    def failure(self, group: FailureGroup) -> None:
        return None


def alone_in(options: Options, server: ForkServer) -> int:
    """How many cases of the run need one rank only."""
    return run("composites", replace(options, operators=("silu_and_mul",), folder=None, devices=1), server).cases


def ranks_in(folder: Path) -> list[int]:
    lines = [json.loads(line) for line in (folder / RESULTS).read_text().splitlines()]
    return [line["case"]["axes"]["ranks"] for line in lines if line["type"] == "case"]


def test_a_run_of_several_ranks_is_taken_up_where_it_was_broken_off(tmp_path: Path, server: ForkServer) -> None:
    options = replace(OF_RANKS, folder=tmp_path)
    whole = run("composites", OF_RANKS, server)
    first = run("composites", options, server, Interrupting(alone_in(options, server) + 3))
    assert first.incomplete == "interrupted"
    assert ranks_in(tmp_path).count(2) == 3
    again = run("composites", replace(options, resume=True), server)
    assert again.exit_code is ExitCode.PASS, (again.incomplete, again.checks, again.failures)
    assert again.cases == whole.cases == len(ranks_in(tmp_path))
    assert read_log(tmp_path / RESULTS).ended


def test_what_failed_on_several_ranks_before_an_interruption_is_made_smaller_on_as_many(
    tmp_path: Path, server: ForkServer
) -> None:
    options = replace(OF_RANKS, folder=tmp_path)
    first = run("times_world", options, server, Interrupting(alone_in(options, server) + 3))
    assert first.incomplete == "interrupted"
    again = run("times_world", replace(options, resume=True, shrink=True), server)
    assert again.failures
    assert {group.operator for group in again.failures} == {"all_reduce"}
    assert all(group.result.case.ranks == 2 and group.shrink for group in again.failures)


def test_what_failed_on_several_ranks_is_run_again_on_as_many(tmp_path: Path, server: ForkServer) -> None:
    first = run("times_world", replace(OF_RANKS, folder=tmp_path), server)
    failed = sum(state.failed for state in first.operators)
    assert failed
    # The command line need not say again how many ranks there were.
    again = run("times_world", replace(OF_RANKS, folder=tmp_path, failed=True, devices=1), server)
    assert again.cases == failed == sum(state.failed for state in again.operators)
    assert ranks_in(tmp_path) == [2] * failed
