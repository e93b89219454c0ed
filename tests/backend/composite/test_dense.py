from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyaccel.backend.composite import dense
from polyaccel.backend.composite.linear import dequantize
from polyaccel.backend.rope import RopeTable
from tests.backend.composite.cases import (
    FLOAT_DTYPES,
    Draw,
    Module,
    assert_within,
    f64,
    filled_store,
    filled_weight,
    spec_of,
    step_input,
    step_of,
    without_readback,
)

SEEDS = st.integers(0, 2**32 - 1)


# -- embedding -------------------------------------------------------------------------------------------------------


@given(
    ids=st.lists(st.integers(0, 19), max_size=9),
    start=st.integers(0, 12),
    rows=st.integers(0, 8),
    dtype=st.sampled_from(FLOAT_DTYPES),
    seed=SEEDS,
)
def test_embedding_looks_up_this_ranks_rows_and_gives_zeros_for_others(
    ids: list[int], start: int, rows: int, dtype: torch.dtype, seed: int
) -> None:
    weight = filled_weight(spec_of("embed", [rows], 5, dtype, lookup=True), Draw(seed))
    step = step_of(step_input([(len(ids), len(ids))], token_ids=ids))
    x = without_readback(dense.embedding, dequantize(weight), weight.spec, step, start)
    assert x.dtype == dtype
    assert x.shape == (len(ids), 5)
    for t, token in enumerate(ids):
        inside = start <= token < start + rows
        expected = weight.tensor[token - start] if inside else torch.zeros(5, dtype=dtype)
        assert torch.equal(x[t], expected)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_embedding_adds_the_adapters_columns_for_ids_of_this_rank(dtype: torch.dtype) -> None:
    draw = Draw(11)
    weight = filled_weight(spec_of("embed", [6], 4, dtype, lookup=True, rank_rows=8), draw)
    adapters = filled_store({"embed": weight}, {0: [Module("embed", 0, 3)], 2: [Module("embed", 0, 1)], 3: []}, draw)
    ids, start = [4, 9, 2, 7, 5, 10], 4
    triples = [(0, 0, 0.5), (1, 0, 1.0), (2, 0, 1.0), (3, 2, 1.0), (5, 3, 1.0), (0, 2, 2.0), (4, 4, 1.0)]
    inputs = step_input([(6, 6)], token_ids=ids, adapters={"tokens": triples})
    step = step_of(inputs, adapters=adapters.store)
    x = without_readback(dense.embedding, dequantize(weight), weight.spec, step, start)
    expected = np.zeros((6, 4))
    magnitude = np.zeros((6, 4))
    for t, token in enumerate(ids):
        if start <= token < start + 6:
            expected[t] = f64(weight.tensor)[token - start]
            magnitude[t] = np.abs(expected[t])
            one_hot = np.eye(6)[token - start]
            for row, slot, mix in triples:
                delta = adapters.delta("embed", 0, slot, one_hot)
                if row == t and delta is not None:
                    expected[t] += mix * delta
                    magnitude[t] += 10 * np.abs(mix * delta) + 10
    assert_within(x, expected, magnitude, depth=4)


def test_an_adapter_on_other_sites_leaves_the_embedding_bit_for_bit() -> None:
    draw = Draw(1)
    weight = filled_weight(spec_of("embed", [6], 4, torch.bfloat16, lookup=True, rank_rows=8), draw)
    other = filled_weight(spec_of("other", [6], 4, torch.bfloat16, rank_rows=8), draw)
    adapters = filled_store({"embed": weight, "other": other}, {0: [Module("other", 0, 3)]}, draw)
    inputs = step_input([(2, 2)], token_ids=[1, 5], adapters={"tokens": [(0, 0, 1.0), (1, 0, 1.0)]})
    x = dense.embedding(weight.tensor, weight.spec, step_of(inputs, adapters=adapters.store), 0)
    assert torch.equal(x, weight.tensor[[1, 5]])


# -- norms -----------------------------------------------------------------------------------------------------------


@given(
    lead=st.sampled_from([(0,), (1,), (4,), (3, 2)]),
    hidden=st.integers(1, 40),
    dtype=st.sampled_from(FLOAT_DTYPES),
    with_residual=st.booleans(),
    seed=SEEDS,
)
def test_rms_norm_normalises_the_rounded_sum(
    lead: tuple[int, ...], hidden: int, dtype: torch.dtype, with_residual: bool, seed: int
) -> None:
    draw = Draw(seed)
    x, weight = draw.tensor(*lead, hidden, dtype=dtype), draw.tensor(hidden, dtype=dtype)
    residual = draw.tensor(*lead, hidden, dtype=dtype) if with_residual else None
    result = without_readback(dense.rms_norm, x, weight, 1e-5, residual)
    if residual is None:
        normed, s = result, x
    else:
        normed, s = result
        assert torch.equal(s, torch.from_numpy(f64(x) + f64(residual)).to(dtype))
    wide = f64(s)
    expected = np.zeros_like(wide)
    for index in np.ndindex(*lead):
        row = wide[index]
        expected[index] = row / math.sqrt((row * row).sum() / hidden + 1e-5) * f64(weight)
    assert normed.dtype == dtype
    assert_within(normed, expected, 2 * np.abs(expected), depth=hidden)


def test_rms_norm_reads_strided_rows() -> None:
    draw = Draw(2)
    wide, weight = draw.tensor(3, 10), draw.tensor(4)
    assert torch.equal(dense.rms_norm(wide[:, 2:6], weight, 1e-6), dense.rms_norm(wide[:, 2:6].clone(), weight, 1e-6))


@given(
    rows=st.integers(0, 4),
    hidden=st.integers(1, 40),
    dtype=st.sampled_from(FLOAT_DTYPES),
    bias=st.booleans(),
    seed=SEEDS,
)
def test_layer_norm_centres_and_scales(rows: int, hidden: int, dtype: torch.dtype, bias: bool, seed: int) -> None:
    draw = Draw(seed)
    x, weight = draw.tensor(rows, hidden, dtype=dtype), draw.tensor(hidden, dtype=dtype)
    shift = draw.tensor(hidden, dtype=dtype) if bias else None
    y = without_readback(dense.layer_norm, x, weight, shift, 1e-5)
    expected, magnitude = np.zeros((rows, hidden)), np.zeros((rows, hidden))
    for t in range(rows):
        row = f64(x)[t]
        centred = row - row.mean()
        scale = f64(weight) / math.sqrt((centred * centred).mean() + 1e-5)
        expected[t] = centred * scale + (f64(shift) if shift is not None else 0.0)
        # An error in the mean shifts every centred value.
        magnitude[t] = (np.abs(row) + np.abs(row).max()) * np.abs(scale) * 3 + np.abs(expected[t])
    assert_within(y, expected, magnitude, depth=hidden)


# -- rotary embedding ------------------------------------------------------------------------------------------------


def rotated(x: np.ndarray, rope: RopeTable, positions: list[int]) -> np.ndarray:
    out, half = x.copy(), rope.rotary_dim // 2
    for t, position in enumerate(positions):
        for head in range(x.shape[1]):
            for i in range(half):
                a, b = (i, i + half) if rope.style == "half" else (2 * i, 2 * i + 1)
                c, s = f64(rope.cos)[position, i], f64(rope.sin)[position, i]
                out[t, head, a] = x[t, head, a] * c - x[t, head, b] * s
                out[t, head, b] = x[t, head, b] * c + x[t, head, a] * s
    return out


@given(
    positions=st.lists(st.integers(0, 9), max_size=5),
    heads=st.integers(1, 3),
    kv_heads=st.integers(0, 2),
    half=st.integers(1, 4),
    rest=st.integers(0, 3),
    style=st.sampled_from(["half", "interleaved"]),
    dtype=st.sampled_from(FLOAT_DTYPES),
    seed=SEEDS,
)
def test_rotary_embedding_turns_pairs_by_the_tokens_position(
    positions: list[int], heads: int, kv_heads: int, half: int, rest: int, style: str, dtype: torch.dtype, seed: int
) -> None:
    draw, tokens = Draw(seed), len(positions)
    angles = draw.tensor(10, half)
    rope = RopeTable(cos=angles.cos(), sin=angles.sin(), rotary_dim=2 * half, style=style)  # type: ignore[arg-type]
    wide = draw.tensor(tokens, heads + kv_heads, 2 * half + rest, dtype=dtype)
    q, k = wide[:, :heads], wide[:, heads:]
    before = wide.clone()
    step = step_of(step_input([(tokens, tokens)], positions=positions))
    for got, x in zip(without_readback(dense.rotary_embedding, q, k, rope, step), (q, k), strict=True):
        expected = rotated(f64(x), rope, positions)
        assert got.dtype == dtype
        assert_within(got, expected, np.full(expected.shape, 2 * np.abs(f64(x)).max(initial=0.0)))
        assert torch.equal(got[..., 2 * half :], x[..., 2 * half :])
    assert torch.equal(wide, before)


def test_a_quarter_turn_is_a_signed_permutation_bit_for_bit() -> None:
    x = Draw(5).tensor(1, 1, 4, dtype=torch.bfloat16)
    step = step_of(step_input([(1, 1)], positions=[0]))
    for style, order in (("half", [2, 3, 0, 1]), ("interleaved", [1, 0, 3, 2])):
        rope = RopeTable(cos=torch.zeros(1, 2), sin=torch.ones(1, 2), rotary_dim=4, style=style)  # type: ignore[arg-type]
        sign = torch.tensor([-1.0, -1.0, 1.0, 1.0] if style == "half" else [-1.0, 1.0, -1.0, 1.0])
        q, _ = dense.rotary_embedding(x, x, rope, step)
        assert torch.equal(q, (x[..., order] * sign).bfloat16())


# -- activations -----------------------------------------------------------------------------------------------------


@given(tokens=st.integers(0, 5), n=st.integers(0, 9), dtype=st.sampled_from(FLOAT_DTYPES), seed=SEEDS)
def test_silu_and_mul_gates_the_second_half_by_the_first(tokens: int, n: int, dtype: torch.dtype, seed: int) -> None:
    x = (Draw(seed).tensor(tokens, 2 * n) * 4).to(dtype)
    y = without_readback(dense.silu_and_mul, x)
    gate, up = f64(x)[:, :n], f64(x)[:, n:]
    expected = gate / (1 + np.exp(-gate)) * up
    assert y.dtype == dtype
    assert_within(y, expected, np.abs(expected))


def test_silu_saturates_exactly() -> None:
    x = torch.tensor([[128.0, 40.0, 0.0, -128.0, 3.0, 5.0, 7.0, 9.0]], dtype=torch.bfloat16)
    assert dense.silu_and_mul(x).float().abs().tolist() == [[384.0, 200.0, 0.0, 0.0]]


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_gelu_is_exact_or_by_tanh(dtype: torch.dtype) -> None:
    x = (Draw(8).tensor(3, 17) * 3).to(dtype)
    wide = f64(x)
    erf = np.vectorize(math.erf)(wide / math.sqrt(2))
    tanh = np.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3))
    for approximate, curve in (("none", erf), ("tanh", tanh)):
        y = without_readback(dense.gelu, x, approximate)
        assert_within(y, 0.5 * wide * (1 + curve), np.abs(wide))


def test_exact_gelu_keeps_infinity_and_the_units_that_erf_is_allowed() -> None:
    assert dense.gelu(torch.full((16,), torch.inf), "none").tolist() == [math.inf] * 16
    x = torch.linspace(-6, 6, 4001)
    wide = f64(x)
    half = 0.5 * wide * (1 + np.vectorize(math.erf)(wide / math.sqrt(2)))
    # Four units of erf, one of the sum and one of each product, all of numbers up to 2.
    allowed = 0.5 * np.abs(wide) * 8 * torch.finfo(torch.float32).eps
    assert (np.abs(f64(dense.gelu(x, "none")) - half) <= allowed).all()


# -- rows ------------------------------------------------------------------------------------------------------------


def test_select_rows_takes_the_rows_whose_logits_are_needed() -> None:
    x = Draw(9).tensor(5, 3)
    rows = without_readback(dense.select_rows, x, step_of(step_input([(5, 5)], logits_rows=[1, 4])))
    assert torch.equal(rows, x[[1, 4]])
    assert without_readback(dense.select_rows, x, step_of(step_input([(5, 5)]))).shape == (0, 3)
    assert dense.select_rows(x, step_of(step_input([(5, 5)], logits_rows=range(5)))) is x
