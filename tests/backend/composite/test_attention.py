from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyaccel.backend.composite import attention
from polyaccel.backend.composite.kv_cache import TensorKVCache
from polyaccel.backend.errors import OperatorError
from polyaccel.backend.kv_cache import KVSpec
from polyaccel.backend.step import StepInput
from tests.backend.composite.cases import (
    CPU,
    FLOAT_DTYPES,
    Draw,
    assert_within,
    f64,
    step_input,
    step_of,
    without_readback,
)

BLOCK = 4


class Paged:
    """Sequences whose keys and values lie in shuffled blocks; every other slot of the cache holds NaN."""

    def __init__(self, contexts: list[int], kv_heads: int, head_dim: int, dtype: torch.dtype, draw: Draw) -> None:
        widest = max([-(-c // BLOCK) for c in contexts], default=0)
        blocks = sum(-(-c // BLOCK) for c in contexts) + 2
        spec = KVSpec(layers=2, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype, blocks=blocks, block_size=BLOCK)
        self.cache = TensorKVCache(spec, CPU)
        poison = torch.full((blocks * BLOCK, kv_heads, head_dim), torch.nan, dtype=dtype)
        self.cache.write(1, torch.arange(blocks * BLOCK), poison, poison)
        free = draw.generator.permutation(blocks).tolist()
        self.tables = np.zeros((len(contexts), widest + 1), dtype=np.int32)
        self.keys, self.values = [], []
        for i, context in enumerate(contexts):
            own = [free.pop() for _ in range(-(-context // BLOCK))]
            self.tables[i, : len(own)] = own
            slots = torch.tensor([own[j // BLOCK] * BLOCK + j % BLOCK for j in range(context)], dtype=torch.int64)
            k, v = (draw.tensor(context, kv_heads, head_dim, dtype=dtype) for _ in range(2))
            self.cache.write(1, slots, k, v)
            self.keys.append(f64(k))
            self.values.append(f64(v))

    def inputs(self, lengths: list[tuple[int, int]], padding: int = 0) -> StepInput:
        return step_input(lengths, tokens=sum(q for q, _ in lengths) + padding, block_tables=self.tables)


def attend(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, visible: list[int], scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """One query head over the visible keys, and the largest absolute value it averages."""
    if not visible:
        return np.zeros(v.shape[-1]), np.zeros(v.shape[-1])
    scores = np.array([scale * float(q @ k[j]) for j in visible])
    p = np.exp(scores - scores.max())
    p /= p.sum()
    out = sum(weight * v[j] for weight, j in zip(p, visible, strict=True))
    # An error of a score, whose own sum is rounded, shifts the averages by as much.
    slack = 1 + float(np.abs(scores).max()) + max(scale * float(np.abs(q) @ np.abs(k[j])) for j in visible)
    return np.asarray(out), np.full(v.shape[-1], slack * np.abs(v[visible]).max())


def check(
    q: torch.Tensor, got: torch.Tensor, paged: Paged, lengths: list[tuple[int, int]], scale: float, window: int | None
) -> None:
    expected, magnitude = np.zeros(tuple(q.shape)), np.zeros(tuple(q.shape))
    token = 0
    for i, (queries, context) in enumerate(lengths):
        for n in range(queries):
            index = context - queries + n
            low = 0 if window is None else max(0, index - window + 1)
            for head in range(q.shape[1]):
                kv_head = head // (q.shape[1] // paged.cache.spec.kv_heads)
                k, v = paged.keys[i][:, kv_head], paged.values[i][:, kv_head]
                result = attend(f64(q)[token, head], k, v, list(range(low, index + 1)), scale)
                expected[token, head], magnitude[token, head] = result
            token += 1
    assert got.dtype == q.dtype
    assert_within(got, expected, magnitude, depth=64)


@st.composite
def ragged(draw: st.DrawFn) -> list[tuple[int, int]]:
    lengths = []
    for _ in range(draw(st.integers(1, 5))):
        context = draw(st.integers(0, 13))
        kinds = {
            "decode": 1,
            "prefill": context,
            "chunk": draw(st.integers(0, context)),
            "none": 0,
            "more": context + 2,
        }
        queries = kinds[draw(st.sampled_from(list(kinds)))]
        lengths.append((queries, context))
    return lengths


@given(
    lengths=ragged(),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    head_dim=st.integers(1, 9),
    window=st.sampled_from([None, 1, 3, 20]),
    padding=st.integers(0, 2),
    dtype=st.sampled_from(FLOAT_DTYPES),
    seed=st.integers(0, 2**32 - 1),
)
def test_paged_attention_serves_prefill_chunks_and_decode_in_one_call(
    lengths: list[tuple[int, int]],
    kv_heads: int,
    group: int,
    head_dim: int,
    window: int | None,
    padding: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    draw = Draw(seed)
    paged = Paged([c for _, c in lengths], kv_heads, head_dim, dtype, draw)
    step = step_of(paged.inputs(lengths, padding))
    q = draw.tensor(step.input.tokens, kv_heads * group, head_dim, dtype=dtype)
    got = without_readback(attention.paged_attention, q, paged.cache, 1, step, 0.7, window)
    check(q, got, paged, lengths, 0.7, window)
    assert not got[step.input.tokens - padding :].any()


@pytest.mark.parametrize("window", [None, 5])
def test_contexts_of_several_tiles_are_joined(monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
    monkeypatch.setattr(attention, "QUERY_TILE", 3)
    monkeypatch.setattr(attention, "PREFILL_KEY_TILE", 4)
    monkeypatch.setattr(attention, "DECODE_KEY_TILE", 5)
    lengths = [(1, 23), (11, 11), (7, 19), (1, 4), (1, 1)]
    draw = Draw(21)
    paged = Paged([c for _, c in lengths], 2, 6, torch.float32, draw)
    step = step_of(paged.inputs(lengths))
    q = draw.tensor(step.input.tokens, 4, 6)
    check(q, attention.paged_attention(q, paged.cache, 1, step, 0.5, window), paged, lengths, 0.5, window)


@pytest.mark.parametrize("window", [None, 40])
def test_a_decoding_row_has_the_same_bits_in_any_batch(window: int | None) -> None:
    draw = Draw(22)
    contexts = [3, 300, 129, 128, 1]
    paged = Paged(contexts, 2, 16, torch.float32, draw)
    q = draw.tensor(5, 6, 16)
    step = step_of(paged.inputs([(1, c) for c in contexts]))
    together = attention.paged_attention(q, paged.cache, 1, step, 0.25, window)
    for i, context in enumerate(contexts):
        alone = step_of(step_input([(1, context)], block_tables=paged.tables[i : i + 1]))
        assert torch.equal(attention.paged_attention(q[i : i + 1], paged.cache, 1, alone, 0.25, window)[0], together[i])


def test_queries_before_the_context_see_nothing_and_give_zeros() -> None:
    draw = Draw(24)
    paged = Paged([2], 1, 4, torch.float32, draw)
    q = draw.tensor(5, 2, 4)
    out = attention.paged_attention(q, paged.cache, 1, step_of(paged.inputs([(5, 2)])), 0.5)
    assert not out[:3].any()
    check(q, out, paged, [(5, 2)], 0.5, None)


def test_large_scores_select_the_hot_keys_exactly() -> None:
    draw = Draw(23)
    lengths = [(6, 6), (1, 9)]
    paged = Paged([6, 9], 1, 4, torch.bfloat16, draw)
    v = torch.arange(9.0).bfloat16().view(9, 1, 1).expand(9, 1, 4)
    for i, context in enumerate([6, 9]):
        slots = torch.tensor([int(paged.tables[i, j // BLOCK]) * BLOCK + j % BLOCK for j in range(context)])
        k = torch.zeros(context, 1, 4, dtype=torch.bfloat16)
        k[[1, 2], 0, 0] = 200.0
        paged.cache.write(1, slots, k, v[:context])
    q = torch.zeros(7, 2, 4, dtype=torch.bfloat16)
    q[:, :, 0] = 1.0
    out = attention.paged_attention(q, paged.cache, 1, step_of(paged.inputs(lengths)), 1.0)
    assert out[:, :, 0].float().tolist() == [[e, e] for e in (0.0, 1.0, 1.5, 1.5, 1.5, 1.5, 1.5)]


def test_write_kv_cache_follows_the_steps_slots() -> None:
    cache = TensorKVCache(KVSpec(layers=1, kv_heads=1, head_dim=2, dtype=torch.float32, blocks=2, block_size=4), CPU)
    k, v = Draw(1).tensor(3, 1, 2), Draw(2).tensor(3, 1, 2)
    without_readback(attention.write_kv_cache, k, v, cache, 0, step_of(step_input([(3, 3)], kv_slots=[6, -1, 2])))
    expected = torch.zeros(8, 1, 2)
    expected[[6, 2]] = k[[0, 2]]
    assert torch.equal(cache.read(0, torch.arange(8))[0], expected)


@given(
    lengths=st.lists(st.integers(0, 7), max_size=4),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 2),
    causal=st.booleans(),
    dtype=st.sampled_from(FLOAT_DTYPES),
    seed=st.integers(0, 2**32 - 1),
)
def test_dense_attention_stays_inside_its_segments(
    lengths: list[int], kv_heads: int, group: int, causal: bool, dtype: torch.dtype, seed: int
) -> None:
    draw, starts = Draw(seed), np.cumsum([0, *lengths]).tolist()
    tokens = starts[-1] + 1
    q = draw.tensor(tokens, kv_heads * group, 5, dtype=dtype)
    k, v = (draw.tensor(tokens, kv_heads, 5, dtype=dtype) for _ in range(2))
    k[-1] = v[-1] = torch.nan
    got = without_readback(attention.dense_attention, q, k, v, starts, 0.4, causal)
    expected, magnitude = np.zeros(tuple(q.shape)), np.zeros(tuple(q.shape))
    for begin, end in pairwise(starts):
        for t in range(begin, end):
            for head in range(kv_heads * group):
                visible = list(range(begin, t + 1 if causal else end))
                result = attend(f64(q)[t, head], f64(k)[:, head // group], f64(v)[:, head // group], visible, 0.4)
                expected[t, head], magnitude[t, head] = result
    assert_within(got, expected, magnitude, depth=64)


def test_queries_of_another_head_width_than_the_cache_are_refused() -> None:
    paged = Paged([3], 1, 8, torch.float32, Draw(1))
    step = step_of(step_input([(1, 3)], block_tables=paged.tables))
    with pytest.raises(OperatorError, match="q must be heads of 8"):
        attention.paged_attention(torch.zeros(1, 2, 16), paged.cache, 1, step, 1.0)


def test_queries_keys_and_values_that_are_no_floats_are_refused() -> None:
    kv = TensorKVCache(KVSpec(layers=1, kv_heads=1, head_dim=8, dtype=torch.float32, blocks=1, block_size=4), CPU)
    with pytest.raises(OperatorError, match="q must be heads of 8"):
        attention.paged_attention(torch.zeros(1, 1, 8, dtype=torch.int32), kv, 0, step_of(step_input([(1, 1)])), 1.0)
    operands = {name: torch.zeros(2, 1, 8) for name in "qkv"}
    for name in operands:
        given = {**operands, name: operands[name].int()}
        with pytest.raises(OperatorError, match="must be floats"):
            attention.dense_attention(**given, starts=(0, 2), scale=1.0, causal=False)


def reads_of(lengths: list[tuple[int, int]], window: int | None, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many slots each read of the cache asks for."""
    paged, found = Paged([context for _, context in lengths], 1, 2, torch.float32, Draw(3)), list[int]()
    read = TensorKVCache.read

    def counted(cache: TensorKVCache, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found.append(slots.numel())
        return read(cache, layer, slots)

    monkeypatch.setattr(TensorKVCache, "read", counted)
    q = torch.zeros(sum(queries for queries, _ in lengths), 1, 2)
    attention.paged_attention(q, paged.cache, 1, step_of(paged.inputs(lengths)), 1.0, window)
    return found


def test_sequences_with_one_token_in_a_row_are_read_together(monkeypatch: pytest.MonkeyPatch) -> None:
    tile = attention.DECODE_KEY_TILE
    assert reads_of([(1, 5), (1, 9), (3, 7), (1, 4), (1, 6)], None, monkeypatch) == [2 * tile, 7, 2 * tile]


def test_keys_before_the_window_of_a_tile_of_queries_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    tile = attention.QUERY_TILE
    assert reads_of([(tile + 44, tile + 44)], 4, monkeypatch) == [tile, 44 + 3]
