"""What the catalogue of planted bugs holds."""

from __future__ import annotations

import datetime

import pytest

from polyaccel.backend import load
from polyaccel_conformance.checks.registry import CHECKS
from polyaccel_conformance.errors import UsageError
from polyaccel_conformance.multi.registry import RANKED_SETS
from polyaccel_conformance.mutants.catalogue import HEALTHY, MUTANTS, apply_mutant
from polyaccel_conformance.mutants.choice import by_date, chosen, portable_to
from polyaccel_conformance.problems.registry import PROBLEM_SETS
from polyaccel_conformance.subject import Subject

REQUIRED = {
    "sgmv falls back inside when the rank is not a multiple of 16": "sgmv.falls_back_unless_16",
    "or the slice narrower than the rank": "sgmv.falls_back_narrow_slice",
    "native computing on the CPU and copying back": "gelu.on_cpu_and_back",
    "a ledger frozen by graphs": "graph.ledger_frozen",
    "refusing hard cases": "sgmv.refuses_hard_ranks",
    "declaring an 8-bit accumulator": "dense.declare_8_bits",
    "all_reduce returning W x": "all_reduce.times_world",
    "skipping the last rank": "all_reduce.skips_last_rank",
    "a no-op barrier": "barrier.no_op",
    "full weights on every rank": "weights.full_on_every_rank",
    "wrong subgroup": "all_reduce.wrong_subgroup",
    "the previous call's result": "all_reduce.previous_result",
    "low-precision accumulators": "linear.bf16_accumulator",
    "split-K in bf16": "linear.split_k_bf16",
    "TF32": "linear.tf32",
    "unwritten tail": "silu.tail_unwritten",
    "out-of-bounds write": "gelu.writes_past_the_end",
    "hidden in-place change": "layer_norm.halves_its_input",
    "stale metadata after replay": "graph.metadata_of_capture",
    "wrong stream": "launch.default_stream",
    "tie rule": "moe_route.ties_to_highest",
    "sign bit of packed int4": "dequantize.sign_bit",
    "no device guard": "launch.no_guard",
    "grid sized at capture": "graph.grid_of_capture",
    "data_ptr cache": "linear.kept_by_address",
    "only the third replay": "graph.third_replay",
}


@pytest.mark.parametrize("what", REQUIRED)
def test_every_kind_of_bug_that_must_be_there_is_there(what: str) -> None:
    assert REQUIRED[what] in MUTANTS


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_names_what_exists(name: str) -> None:
    mutant = MUTANTS[name]
    assert mutant.check in CHECKS
    assert set(mutant.operators) <= {*PROBLEM_SETS, *RANKED_SETS}
    assert mutant.what.endswith(".")


@pytest.mark.parametrize("name", [name for name, mutant in (*MUTANTS.items(), *HEALTHY.items()) if not mutant.engine])
def test_a_mutant_keeps_its_host_s_name(name: str) -> None:
    mutant = {**MUTANTS, **HEALTHY}[name]
    assert Subject(name=mutant.host, mutant=name).open().name == mutant.host


def test_narrow_and_engine_mutants_and_those_of_several_ranks_are_there() -> None:
    assert sum(mutant.narrow for mutant in MUTANTS.values()) >= 15
    assert sum(mutant.engine for mutant in MUTANTS.values()) >= 10
    assert sum(mutant.devices > 1 for mutant in MUTANTS.values()) >= 10


def test_an_unknown_mutant_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"no mutant 'nobody'"):
        apply_mutant("nobody", load("cpu"))
    with pytest.raises(UsageError, match=r"no mutant 'nobody'"):
        chosen(["nobody"])


def test_mutants_by_date_are_the_same_all_day_and_others_on_another() -> None:
    mutants = list(MUTANTS.values())
    first, second = datetime.date(2026, 3, 1), datetime.date(2026, 3, 2)
    assert by_date(mutants, 3, first) == by_date(mutants[::-1], 3, first)
    assert by_date(mutants, 3, first) != by_date(mutants, 3, second)


@pytest.mark.parametrize("backend", ["cpu", "simulated"])
def test_at_least_ten_mutants_fit_any_backend_that_has_the_operators(backend: str) -> None:
    assert len(portable_to(Subject(name=backend).open())) >= 10


def test_a_mutant_of_the_engine_leaves_the_backend_to_be_found_by_its_name() -> None:
    assert Subject(mutant="engine.freed_early").by_name
    assert not Subject(mutant="linear.tf32").by_name
    assert not Subject(name="simulated").by_name
