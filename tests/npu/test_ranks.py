"""The suite's cases of several ranks on as many cards, where a row-parallel layer may be one kernel with its sum."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from polyaccel_conformance.case import Choice
from polyaccel_conformance.multi.devices import qualification
from polyaccel_conformance.multi.ranks import RankedResult, RankPool
from polyaccel_conformance.subject import Subject
from polyaccel_npu.backend import NpuBackend
from tests.conformance.multi.cases import ranked_case

pytestmark = pytest.mark.slow

FUSED, PARTS = "npu.mm_all_reduce", "npu.matmul+hccl_all_reduce"
LONG = "POLYACCEL_LONG_TESTS"
WORLDS = (2, pytest.param(4, marks=pytest.mark.skipif(not os.environ.get(LONG), reason=f"set {LONG}=1")))
WITHHELD = 6.0
"""Seconds."""
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
simulated = os.environ.get("CANNSIM_ACTIVE") == "1"


@pytest.fixture(scope="module", params=WORLDS)
def pool(request: pytest.FixtureRequest) -> Iterator[RankPool]:
    world: int = request.param
    if len(NpuBackend().devices()) < world:
        pytest.skip(f"{world} cards are needed")
    # New groups have as long to meet as their collectives wait, and ranks may share few cores.
    with RankPool(Subject(name="npu"), world, withheld=WITHHELD) as ranks:
        ranks.start()
        yield ranks


def ran(pool: RankPool, operator: str, **axes: Choice) -> RankedResult:
    result = pool.run(ranked_case(operator, pool.world_size, **axes))
    assert result.passed, result.failures
    return result


def test_each_rank_has_a_card_of_its_own_and_says_whether_it_is_simulated(pool: RankPool) -> None:
    assert qualification(pool.identities) == (f"{pool.world_size} simulated devices" if simulated else "")
    assert {identity.transport for identity in pool.identities} == {"hccl"}


@pytest.mark.parametrize("operator", ["row_parallel_linear", "row_parallel_add_norm"])
@pytest.mark.parametrize("adapters", ["none", "mixes"])
@pytest.mark.parametrize(("dtype", "decode"), [("float16", False), ("bfloat16", True), ("float32", False)])
def test_a_row_parallel_layer_is_right_as_one_kernel_and_in_parts(
    pool: RankPool, operator: str, adapters: str, dtype: str, decode: bool
) -> None:
    result = ran(
        pool,
        operator,
        dtype=dtype,
        dims__tokens=7,
        dims__k=17,
        dims__n=33,
        data="normal",
        structure__adapters=adapters,
        structure__ranks="mixed",
        structure__bias=True,
        structure__decode=decode,
        layouts__x="row_padded",
    )
    assert result.implementation.startswith(FUSED if dtype == "float16" and not decode else PARTS)
    assert {"values.bound", "comm.collectives", "comm.trace"} <= set(result.checks)


@pytest.mark.parametrize("operator", ["row_parallel_linear", "row_parallel_add_norm"])
@pytest.mark.parametrize("operand", ["x", "x.transposed", "weight", "bias"])
def test_operands_that_are_not_contiguous_give_the_bits_of_those_that_are(
    pool: RankPool, operator: str, operand: str
) -> None:
    result = ran(pool, operator, dtype="float16", dims__tokens=3, structure__operand=operand)
    assert "comm.row_parallel_operands" in result.checks


@pytest.mark.parametrize("module", MODULES)
def test_an_adapter_of_a_module_adds_the_same_at_every_world_size(pool: RankPool, module: str) -> None:
    result = ran(pool, "sgmv", dtype="float16", dims__tokens=2, structure__module=module, structure__ranks="uneven")
    assert "lora.tp_delta_equal" in result.checks


@pytest.mark.parametrize("family", ["llama", "qwen3", "mixtral"])
def test_every_layer_of_a_small_model_is_right_on_each_rank(pool: RankPool, family: str) -> None:
    result = ran(
        pool,
        "model.layers",
        dtype="float16",
        attributes__family=family,
        structure__phase="mixed",
        structure__adapters="many",
    )
    assert "model.layers" in result.checks


@pytest.mark.parametrize("scenario", ["interleaved", "subgroups", "withheld", "failing"])
def test_groups_do_not_mix_and_a_rank_that_stays_away_is_an_error_in_time(pool: RankPool, scenario: str) -> None:
    result = ran(pool, "all_reduce", dtype="float16", structure__scenario=scenario)
    assert result.checks
