"""MatmulAllReduce on quantised operands: the rows of the constraint table for A16W8 and A8W8."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyaccel_cannsim.operators.refusal import INVALID, TILING, Refusal
from tests.cannsim_operators.operands import (
    HALVES,
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

WEIGHT = "aclnnWeightQuantMatmulAllReduce"
QUANT = "aclnnQuantMatmulAllReduceV2"


def ones(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


def weight_call(**changes: Any) -> tuple[Any, ...]:
    call: dict[str, Any] = {
        "x1": ones(4, 64),
        "x2": ones(64, 6, dtype=torch.int8),
        "bias": None,
        "scale": ones(6),
        "offset": None,
        "x3": None,
        "group": "alone",
        "reduce_op": "sum",
        "comm_turn": 0,
        "stream_mode": 1,
        "group_size": 0,
        "out": ones(4, 6),
    }
    assert changes.keys() <= call.keys()
    return tuple((call | changes).values())


def quant_call(**changes: Any) -> tuple[Any, ...]:
    call: dict[str, Any] = {
        "x1": ones(4, 8, dtype=torch.int8),
        "x2": ones(8, 6, dtype=torch.int8),
        "bias": None,
        "x3": None,
        "scale": ones(6, dtype=torch.float32),
        "per_token": ones(4, dtype=torch.float32),
        "group": "alone",
        "reduce_op": "sum",
        "comm_turn": 0,
        "stream_mode": 1,
        "out": ones(4, 6),
    }
    assert changes.keys() <= call.keys()
    return tuple((call | changes).values())


@pytest.mark.parametrize("shape", [(1,), (6,), (1, 6)])
def test_scales_per_tensor_and_per_channel_are_legal(shape: tuple[int, ...]) -> None:
    check(WEIGHT, *weight_call(scale=ones(*shape), offset=ones(*shape)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scale": ones(64)}, "antiquantScale"),
        ({"scale": ones(6, 1)}, "antiquantScale"),
        ({"offset": ones(1)}, "antiquantOffset"),
        ({"scale": ones(6, dtype=torch.bfloat16)}, "same dtype"),
        ({"group_size": 16, "scale": ones(4, 6)}, "multiple of 32"),
        ({"group_size": 48, "scale": ones(2, 6)}, "multiple of 32"),
        ({"group_size": 64, "scale": ones(1, 6)}, "multiple of 32"),
        ({"group_size": 32, "scale": ones(6)}, "antiquantScale"),
        ({"x2": ones(64, 6)}, "dtype support list"),
        ({"x2": ones(64, 12, dtype=torch.int8)[:, ::2]}, "only as a transpose"),
        ({"reduce_op": "max"}, "reduceOp"),
        (
            {
                "x1": ones(1, 65536),
                "x2": torch.zeros(65536, 1, dtype=torch.int8),
                "scale": ones(1),
                "out": ones(1, 1),
            },
            "65535",
        ),
    ],
)
def test_the_simulator_refuses_what_the_page_of_weight_quant_forbids(changes: dict[str, Any], words: str) -> None:
    refused(INVALID, words, WEIGHT, *weight_call(**changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"per_token": None}, "dequantScale"),  # float32 without a scale per token
        ({"scale": ones(6, dtype=torch.int64)}, "dequantScale"),
        ({"scale": ones(4, dtype=torch.float32)}, "dequantScale"),
        ({"out": ones(4, 6, dtype=torch.bfloat16)}, "dequantScale"),
        ({"per_token": ones(5, dtype=torch.float32)}, "pertokenScale"),
        ({"bias": ones(6)}, "bias"),
        ({"x1": ones(4, 8)}, "dtype support list"),
        ({"x1": torch.ones(0, 8, dtype=torch.int8)}, "empty"),
    ],
)
def test_the_simulator_refuses_what_the_page_of_quant_forbids(changes: dict[str, Any], words: str) -> None:
    check(QUANT, *quant_call())
    refused(INVALID, words, QUANT, *quant_call(**changes))


def test_n_beyond_65535_is_legal_only_for_a_transposed_weight() -> None:
    n = 65536
    wide: dict[str, Any] = {"out": ones(4, n), "scale": ones(1, dtype=torch.float32)}
    check(QUANT, *quant_call(x2=torch.ones(n, 8, dtype=torch.int8).t(), **wide))
    refused(INVALID, "65535", QUANT, *quant_call(x2=torch.ones(8, n, dtype=torch.int8), **wide))


def test_strided_scales_are_uncontiguous_inputs_of_the_second_stage() -> None:
    launch = check(
        QUANT, *quant_call(per_token=ones(8, dtype=torch.float32)[::2], scale=ones(12, dtype=torch.float32)[::2])
    )
    with pytest.raises(Refusal, match="has 2 uncontiguous input"):
        launch.check()


@pytest.mark.parametrize(("name", "call"), [(WEIGHT, weight_call), (QUANT, quant_call)])
def test_world_sizes_are_checked_for_quantised_operands_too(name: str, call: Any) -> None:
    refused(TILING, "has 3", name, *call(group="sized"), env=environment(Sized(3)))


@given(
    seed=st.integers(0, 2**16),
    shape=st.tuples(st.integers(1, 4), st.integers(33, 80), st.integers(1, 7)),
    dtype=st.sampled_from(HALVES),
    grouped=st.booleans(),
)
def test_quantised_sums_over_two_ranks_match_float64(
    seed: int, shape: tuple[int, int, int], dtype: torch.dtype, grouped: bool
) -> None:
    m, k, n = shape
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-128, 128, (2, n, k), generator=generator).to(torch.int8)
    rows = torch.randint(-128, 128, (2, m, k), generator=generator).to(torch.int8)
    groups = -(-k // 32) if grouped else 1
    scale, offset = draw(seed, groups, n, dtype=dtype, scale=0.01), draw(seed + 1, groups, n, dtype=dtype)
    x1, x3 = draw(seed + 2, 2, m, k, dtype=dtype), draw(seed + 3, 2, m, n, dtype=dtype)
    channel = draw(seed + 4, n, scale=0.01)
    channel = channel.to(dtype) if dtype == torch.bfloat16 else channel
    token, bias = draw(seed + 5, m, scale=0.01), torch.arange(n, dtype=torch.int32)

    def work(rank: Any) -> tuple[torch.Tensor, torch.Tensor]:
        r, env = rank.rank, environment(rank)
        first, second = torch.empty(m, n, dtype=dtype), torch.empty(m, n, dtype=dtype)
        tail = ("threads", "sum", 0, 1)
        run(WEIGHT, x1[r], codes[r].t(), None, scale, offset, x3[r], *tail, 32 if grouped else 0, first, env=env)
        run(QUANT, rows[r], codes[r].t(), bias, x3[r], channel, token, *tail, second, env=env)
        return first, second

    found = on_ranks(2, work)
    spread = [np.repeat(exact(one), 32 if grouped else k, 0)[:k] for one in (scale, offset)]
    wanted, size, quant, quant_size = 0.0, 0.0, 0.0, 0.0
    for r in range(2):
        raw = exact(codes[r]).T
        weight = (raw + spread[1]) * spread[0]
        wanted = wanted + exact(x1[r]) @ weight + exact(x3[r])
        size = size + abs(exact(x1[r])) @ ((abs(raw) + abs(spread[1])) * abs(spread[0])) + abs(exact(x3[r]))
        scales = exact(channel) * exact(token)[:, None]
        quant = quant + (exact(rows[r]) @ raw + exact(bias)) * scales + exact(x3[r])
        quant_size = quant_size + (abs(exact(rows[r])) @ abs(raw) + exact(bias)) * abs(scales) + abs(exact(x3[r]))
    for first, second in found:
        close(first, np.asarray(wanted), size, terms=k)
        close(second, np.asarray(quant), quant_size, terms=4)


def test_a_packed_scale_is_the_float_in_its_low_half() -> None:
    packed = torch.tensor([0.5, -2.0]).view(torch.int32).to(torch.int64) & 0xFFFFFFFF | (1 << 46)
    out = torch.empty(1, 2, dtype=torch.float16)
    x1, x2 = torch.tensor([[3]], dtype=torch.int8), torch.tensor([[1, 2]], dtype=torch.int8)
    run("aclnnQuantMatmulAllReduce", x1, x2, None, None, packed, "alone", "sum", 0, 1, out)
    assert out.tolist() == [[1.5, -12.0]]
