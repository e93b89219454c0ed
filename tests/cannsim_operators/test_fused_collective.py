"""Matmul fused with a collective: every row of the published constraint table is refused, and the sums are right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyaccel_cannsim.operators.environment import CHIP_310P, CHIP_910B, CHIP_A3
from polyaccel_cannsim.operators.operator import Launch
from polyaccel_cannsim.operators.refusal import INNER, INVALID, NULL_POINTER, TILING, Refusal
from tests.cannsim_operators.operands import (
    HALVES,
    Alone,
    Host,
    Sized,
    check,
    close,
    draw,
    environment,
    exact,
    on_ranks,
    refused,
    run,
)

REDUCE = "aclnnMatmulAllReduce"
REDUCE_V2 = "aclnnMatmulAllReduceV2"
SCATTER = "aclnnMatmulReduceScatter"
GATHER = "aclnnAllGatherMatmul"


def half(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


def reduce_call(**changes: Any) -> tuple[Any, ...]:
    """Legal arguments of aclnnMatmulAllReduce, some of them changed."""
    call: dict[str, Any] = {
        "x1": half(4, 8),
        "x2": half(8, 6),
        "bias": None,
        "group": "alone",
        "reduce_op": "sum",
        "comm_turn": 0,
        "stream_mode": 1,
        "out": half(4, 6),
    }
    assert changes.keys() <= call.keys()
    return tuple((call | changes).values())


def scatter_call(**changes: Any) -> tuple[Any, ...]:
    call: dict[str, Any] = {
        "x1": half(4, 256),
        "x2": half(256, 6),
        "bias": None,
        "group": "sized",
        "reduce_op": "sum",
        "comm_turn": 0,
        "stream_mode": 1,
        "out": half(2, 6),
    }
    assert changes.keys() <= call.keys()
    return tuple((call | changes).values())


def gather_call(**changes: Any) -> tuple[Any, ...]:
    call: dict[str, Any] = {
        "x1": half(4, 256),
        "x2": half(256, 6),
        "bias": None,
        "group": "sized",
        "gather_index": 0,
        "comm_turn": 0,
        "stream_mode": 1,
        "out": half(8, 6),
        "gathered": half(8, 256),
    }
    assert changes.keys() <= call.keys()
    return tuple((call | changes).values())


def test_the_calls_that_the_refusals_start_from_are_legal() -> None:
    check(REDUCE, *reduce_call())
    check(SCATTER, *scatter_call(), env=environment(Sized(2)))
    check(GATHER, *gather_call(), env=environment(Sized(2)))


@pytest.mark.parametrize("chip", [CHIP_A3, CHIP_310P])
def test_the_simulator_refuses_all_reduce_on_other_chips(chip: str) -> None:
    refused(INVALID, "not supported on this chip", REDUCE, *reduce_call(), env=environment(chip=chip))


@pytest.mark.parametrize(("name", "call"), [(SCATTER, scatter_call), (GATHER, gather_call)])
def test_the_simulator_refuses_reduce_scatter_and_all_gather_on_310p(name: str, call: Any) -> None:
    refused(INVALID, "not supported on this chip", name, *call(), env=environment(Sized(2), chip=CHIP_310P))


@pytest.mark.parametrize("size", [3, 5, 6, 7, 16])
def test_the_simulator_refuses_world_sizes_of_all_reduce_other_than_1_2_4_8(size: int) -> None:
    refused(TILING, f"has {size}", REDUCE, *reduce_call(group="sized"), env=environment(Sized(size)))


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_world_sizes_1_2_4_8_of_all_reduce_are_legal(size: int) -> None:
    check(REDUCE, *reduce_call(group="sized"), env=environment(Sized(size)))


@pytest.mark.parametrize(
    ("chip", "size", "legal"), [(CHIP_910B, 16, False), (CHIP_A3, 16, True), (CHIP_910B, 1, False)]
)
def test_the_simulator_refuses_meshes_of_reduce_scatter_and_all_gather(chip: str, size: int, legal: bool) -> None:
    env = environment(Sized(size), chip=chip)
    scatter = scatter_call(x1=half(32, 256), out=half(32 // size, 6))
    gather = gather_call(out=half(4 * size, 6), gathered=half(4 * size, 256))
    for name, call in ((SCATTER, scatter), (GATHER, gather)):
        if legal:
            check(name, *call, env=env)
        else:
            refused(TILING, "ranks", name, *call, env=env)


def test_a_strided_x1_is_refused_as_cann_refuses_it() -> None:
    launch = check(REDUCE, *reduce_call(x1=half(8, 4).t()))
    assert isinstance(launch, Launch)  # the first stage lets it pass
    with pytest.raises(Refusal, match="Op MatmulAllReduce has 1 uncontiguous input") as caught:
        launch.check()
    assert caught.value.code == INNER


def test_strided_bias_and_x3_count_as_uncontiguous_inputs() -> None:
    x1, x2, _, *rest, out = reduce_call()
    launch = check(REDUCE_V2, x1, x2, half(12)[::2], half(6, 4).t(), *rest, out)
    with pytest.raises(Refusal, match="has 2 uncontiguous input"):
        launch.check()


@given(st.integers(1, 4), st.integers(1, 4), st.booleans())
def test_the_simulator_refuses_every_stride_of_x2_but_a_transpose(row: int, column: int, swap: bool) -> None:
    k, n = 8, 6
    x2 = half(n * column, k * row)[::column, ::row].t() if swap else half(k * row, n * column)[::row, ::column]
    if row == column == 1:
        check(REDUCE, *reduce_call(x2=x2))
    else:
        refused(INVALID, "only as a transpose", REDUCE, *reduce_call(x2=x2))


@pytest.mark.parametrize("name", [SCATTER, GATHER])
def test_the_simulator_refuses_a_transposed_x1_of_reduce_scatter_and_all_gather(name: str) -> None:
    call = scatter_call if name == SCATTER else gather_call
    refused(INVALID, "transposed", name, *call(x1=half(256, 4).t()), env=environment(Sized(2)))


@pytest.mark.parametrize("shape", [(8,), (1, 2, 4, 8)])
def test_the_simulator_refuses_x1_of_other_ranks(shape: tuple[int, ...]) -> None:
    refused(INVALID, "dimensions", REDUCE, *reduce_call(x1=half(*shape)))


def test_the_simulator_refuses_an_nz_weight_of_the_float_operator() -> None:
    refused(INVALID, "format", REDUCE, *reduce_call(x2=Host(half(8, 6), format=29)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_the_simulator_refuses_float32_and_integers(dtype: torch.dtype) -> None:
    refused(INVALID, "dtype support list", REDUCE, *reduce_call(x1=torch.ones(4, 8, dtype=dtype)))


def test_the_simulator_refuses_mixed_types() -> None:
    refused(INVALID, "same dtype", REDUCE, *reduce_call(x2=half(8, 6, dtype=torch.bfloat16)))


@pytest.mark.parametrize(
    ("x1", "x2", "out"), [((0, 8), (8, 6), (0, 6)), ((4, 0), (0, 6), (4, 6)), ((4, 8), (8, 0), (4, 0))]
)
def test_the_simulator_refuses_empty_operands_of_all_reduce(
    x1: tuple[int, int], x2: tuple[int, int], out: tuple[int, int]
) -> None:
    refused(INVALID, "empty", REDUCE, *reduce_call(x1=half(*x1), x2=half(*x2), out=half(*out)))


def test_the_simulator_refuses_unequal_k() -> None:
    refused(INVALID, "Expected k", REDUCE, *reduce_call(x2=half(9, 6)))


@pytest.mark.parametrize("k", [1, 255, 65535])
@pytest.mark.parametrize("name", [SCATTER, GATHER])
def test_the_simulator_refuses_k_outside_256_to_65534(name: str, k: int) -> None:
    call = scatter_call if name == SCATTER else gather_call
    changes: dict[str, Any] = {"x1": half(4, k), "x2": half(k, 6)}
    refused(INVALID, "k-axis", name, *call(**changes), env=environment(Sized(2)))


def test_the_simulator_refuses_rows_that_the_ranks_do_not_divide() -> None:
    refused(INVALID, "multiple of the 2 ranks", SCATTER, *scatter_call(x1=half(3, 256)), env=environment(Sized(2)))


def test_the_simulator_refuses_a_bias_of_two_axes() -> None:
    refused(INVALID, "bias", REDUCE, *reduce_call(bias=half(1, 6)))


@pytest.mark.parametrize("name", [SCATTER, GATHER])
def test_the_simulator_refuses_a_bias_that_is_not_zero_where_the_device_sees_it(name: str) -> None:
    call = scatter_call if name == SCATTER else gather_call
    launch = check(name, *call(bias=half(6)), env=environment(Sized(2)))
    launch.check()
    with pytest.raises(Refusal, match="bias that is not zero"):
        launch.compute()


@pytest.mark.parametrize("operation", ["max", "min", "prod", "SUM", ""])
def test_the_simulator_refuses_reductions_other_than_sum(operation: str) -> None:
    refused(INVALID, "reduceOp", REDUCE, *reduce_call(reduce_op=operation))
    refused(INVALID, "reduceOp", SCATTER, *scatter_call(reduce_op=operation), env=environment(Sized(2)))


@pytest.mark.parametrize("changes", [{"comm_turn": 1}, {"stream_mode": 0}])
def test_the_simulator_refuses_other_turns_and_stream_modes(changes: dict[str, int]) -> None:
    refused(INVALID, "Expected", REDUCE, *reduce_call(**changes))


def test_the_simulator_refuses_gathering_the_weight() -> None:
    refused(INVALID, "gatherIndex", GATHER, *gather_call(gather_index=1), env=environment(Sized(2)))


def test_the_simulator_refuses_a_second_communicator_for_fused_operators() -> None:
    other = Alone()
    other.name = "other"  # type: ignore[misc]
    env = environment(Alone(), other)
    check(REDUCE, *reduce_call(), env=env)
    check(REDUCE, *reduce_call(), env=env)
    refused(INNER, "share one communicator", REDUCE, *reduce_call(group="other"), env=env)


def test_the_simulator_refuses_a_group_that_no_rank_has_made() -> None:
    refused(INNER, "no communicator", REDUCE, *reduce_call(group="elsewhere"))


def test_a_null_operand_is_reported_as_a_null_pointer() -> None:
    refused(NULL_POINTER, "x1", REDUCE, *reduce_call(x1=None))


@given(
    seed=st.integers(0, 2**16),
    size=st.sampled_from([1, 2, 4]),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 40), st.integers(1, 9)),
    dtype=st.sampled_from(HALVES),
    transposed=st.booleans(),
    batched=st.booleans(),
)
def test_all_reduce_adds_every_ranks_product_bias_and_x3(
    seed: int, size: int, shape: tuple[int, int, int], dtype: torch.dtype, transposed: bool, batched: bool
) -> None:
    m, k, n = shape
    lead = (2, m) if batched else (m,)
    x1 = [draw(seed + r, *lead, k, dtype=dtype) for r in range(size)]
    x2 = [draw(seed + 50 + r, n, k, dtype=dtype) for r in range(size)]
    x3 = [draw(seed + 70 + r, *lead, n, dtype=dtype) for r in range(size)]
    bias = draw(seed + 90, n, dtype=dtype)

    def work(rank: Any) -> torch.Tensor:
        out = torch.empty(*lead, n, dtype=dtype)
        weight = x2[rank.rank].t() if transposed else x2[rank.rank].t().contiguous()
        env = environment(rank)
        run(REDUCE_V2, x1[rank.rank], weight, bias, x3[rank.rank], "threads", "sum", 0, 1, out, env=env)
        return out

    found = on_ranks(size, work)
    wanted = sum(exact(x1[r]) @ exact(x2[r]).T + exact(bias) + exact(x3[r]) for r in range(size))
    size_of = sum(abs(exact(x1[r])) @ abs(exact(x2[r])).T + abs(exact(bias)) + abs(exact(x3[r])) for r in range(size))
    for out in found:
        assert torch.equal(out, found[0])
        close(out, wanted, size_of, terms=k + 2 * size)


@given(seed=st.integers(0, 2**16), rows=st.integers(1, 3), n=st.integers(1, 9), dtype=st.sampled_from(HALVES))
def test_reduce_scatter_and_all_gather_compute_their_formulas(seed: int, rows: int, n: int, dtype: torch.dtype) -> None:
    size, k = 2, 256
    x1 = [draw(seed + r, rows * size, k, dtype=dtype, scale=0.1) for r in range(size)]
    x2 = [draw(seed + 9 + r, k, n, dtype=dtype, scale=0.1) for r in range(size)]

    def work(rank: Any) -> tuple[torch.Tensor, ...]:
        env = environment(rank)
        scattered = torch.empty(rows, n, dtype=dtype)
        run(SCATTER, x1[rank.rank], x2[rank.rank], None, "threads", "sum", 0, 1, scattered, env=env)
        out, gathered = torch.empty(rows * size * size, n, dtype=dtype), torch.empty(rows * size * size, k, dtype=dtype)
        run(GATHER, x1[rank.rank], x2[rank.rank], None, "threads", 0, 0, 1, out, gathered, env=env)
        return scattered, out, gathered

    found = on_ranks(size, work)
    total = sum(exact(x1[r]) @ exact(x2[r]) for r in range(size))
    size_of = sum(abs(exact(x1[r])) @ abs(exact(x2[r])) for r in range(size))
    whole = torch.cat(x1)
    for r, (scattered, out, gathered) in enumerate(found):
        close(scattered, total[r * rows : (r + 1) * rows], size_of[r * rows : (r + 1) * rows], terms=k)
        assert torch.equal(gathered, whole)
        close(out, exact(whole) @ exact(x2[r]), abs(exact(whole)) @ abs(exact(x2[r])), terms=k)
