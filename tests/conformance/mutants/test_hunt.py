"""Planted bugs are found by the checks that must find them, and hosts without one are not killed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest

from polyaccel_conformance.mutants.catalogue import HEALTHY, MUTANTS
from polyaccel_conformance.mutants.score import examine, hunt, uniform_share
from polyaccel_conformance.subject import Subject
from polyaccel_conformance.workers.process import ForkServer

QUICK = (
    "silu.tail_unwritten",
    "gelu.writes_past_the_end",
    "dequantize.sign_bit",
    "rms_norm.alias",
    "kv_cache.last_slot_lost",
    "sampling.bias_outlives",
    "graph.ledger_frozen",
    "launch.no_guard",
    "all_reduce.skips_last_rank",
)


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    with closing(ForkServer()) as found:
        yield found


@pytest.mark.parametrize("name", QUICK)
def test_a_planted_bug_is_found_by_its_check(name: str, server: ForkServer) -> None:
    assert set(hunt(MUTANTS[name], server).kills) == {MUTANTS[name].check}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", MUTANTS)
def test_every_planted_bug_is_found_by_its_check(name: str, server: ForkServer) -> None:
    assert MUTANTS[name].check in hunt(MUTANTS[name], server).kills


def test_a_run_ends_soon_after_the_check_has_found_its_mutant(server: ForkServer) -> None:
    found = hunt(MUTANTS["all_reduce.times_world"], server)
    assert found.kills == {"comm.collectives": 1}
    assert found.cases < 10


@pytest.mark.parametrize(
    ("name", "operators"),
    [
        ("healthy.dense", ("gelu", "select_rows", "storage.sampling")),
        ("healthy.collectives", ("all_reduce", "barrier")),
        ("healthy.devices", ("silu_and_mul",)),
    ],
)
def test_healthy_code_in_the_same_wrappers_is_not_killed(
    name: str, operators: tuple[str, ...], server: ForkServer
) -> None:
    found = examine(HEALTHY[name], server, operators)
    assert found.cases > 50
    assert found.kills == {}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", HEALTHY)
def test_no_check_kills_healthy_code(name: str, server: ForkServer) -> None:
    assert examine(HEALTHY[name], server).kills == {}


def test_a_bug_that_is_called_narrow_is_rare_in_uniform_cases_and_found_all_the_same(server: ForkServer) -> None:
    narrow = MUTANTS["gelu.first_of_65"]
    share = uniform_share(narrow, (narrow.check,), server)
    assert share is not None
    assert share.cases == 300
    assert share.share < 0.05
    assert hunt(narrow, server).kills
    assert hunt(narrow, server, seed=5, corpus=False).kills


def test_a_wrapper_is_planted_around_another_backend_s_operators(server: ForkServer) -> None:
    planted = MUTANTS["silu.hides_nan"]
    found = hunt(planted, server, subject=Subject(name="simulated", mutant=planted.name))
    assert set(found.kills) == {planted.check}
