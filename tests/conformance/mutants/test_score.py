"""Planted bugs are found by the checks that must find them, and the host without one is not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest

from polyaccel.backend import load
from polyaccel_conformance.checks.registry import CHECKS
from polyaccel_conformance.errors import UsageError
from polyaccel_conformance.mutants.catalogue import MUTANTS, apply_mutant
from polyaccel_conformance.mutants.score import Score, matrix, score, sole_killers
from polyaccel_conformance.problems.registry import PROBLEM_SETS
from polyaccel_conformance.workers.process import ForkServer

QUICK = ("silu.tail_unwritten", "gelu.writes_past_the_end", "dequantize.sign", "select_rows.last", "rms_norm.alias")


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    with closing(ForkServer()) as found:
        yield found


def _killed(name: str, server: ForkServer) -> Score:
    mutant = MUTANTS[name]
    return score(mutant, [mutant.check], mutant.operators, server, stop=True)


@pytest.mark.parametrize("name", QUICK)
def test_a_planted_bug_is_found_by_its_check(name: str, server: ForkServer) -> None:
    assert _killed(name, server).kills == {MUTANTS[name].check: 1}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", MUTANTS)
def test_every_planted_bug_is_found_by_its_check(name: str, server: ForkServer) -> None:
    assert MUTANTS[name].check in _killed(name, server).kills


def test_the_host_through_the_same_command_is_not_killed(server: ForkServer) -> None:
    found = score(None, ["values.exact", "values.bound", "memory.reads"], ["gelu", "select_rows"], server)
    assert found.cases > 100
    assert found.kills == {}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_keeps_its_host_s_name_and_names_what_exists(name: str) -> None:
    mutant = MUTANTS[name]
    assert apply_mutant(name, load("cpu")).name == "cpu"
    assert mutant.check in CHECKS
    assert set(mutant.operators) <= set(PROBLEM_SETS)


def test_an_unknown_mutant_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"no mutant 'nobody'"):
        apply_mutant("nobody", load("cpu"))


def test_a_matrix_shows_shares_and_who_kills_alone() -> None:
    scores = [
        Score(mutant="a", cases=10, failing=1, kills={"values.exact": 1}),
        Score(mutant="b", cases=10, failing=5, kills={"values.exact": 5, "memory.reads": 2}),
    ]
    assert sole_killers(scores) == {"values.exact": ["a"]}
    text = matrix(scores)
    assert "| a | 10 | 10.0% |  | 1 |" in text
    assert "- `values.exact`: a" in text
