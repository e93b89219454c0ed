from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyaccel.backend.cpu import attention, decode_plan
from polyaccel.backend.cpu.backend import CpuBackend
from polyaccel.backend.errors import OperatorError
from polyaccel.backend.kv_cache import KVSpec
from tests.backend.composite.cases import Draw, NoReadback, assert_within, f64, step_input
from tests.backend.cpu.machine import DTYPES, Machine, intermediate

BLOCK = 4
WAYS = ((1 << 30, 1 << 30), (0, 1 << 30), (0, 0))
"""Limits under which decode copies keys and values, values only, and nothing."""

Lengths = list[tuple[int, int]]
"""(queries, context) of each sequence."""


class Paged:
    """Sequences with their keys and values in blocks; every slot that none of them reads holds NaN.

    ``shuffled`` scatters the blocks over a large cache, ``shared`` gives every two sequences the same first block.
    """

    def __init__(
        self,
        lengths: Lengths,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        draw: Draw,
        *,
        shuffled: bool,
        shared: bool,
    ) -> None:
        contexts = [context for _, context in lengths]
        needed = sum(-(-context // BLOCK) for context in contexts)
        blocks = 3 * needed + 2 if shuffled else needed + 1
        self.machine = Machine()
        self.spec = KVSpec(layers=2, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype, blocks=blocks, block_size=BLOCK)
        self.cache = self.machine.cache(self.spec)
        poison = torch.full((blocks * BLOCK, kv_heads, head_dim), torch.nan, dtype=dtype)
        self.cache.write(1, torch.arange(blocks * BLOCK), poison, poison)
        free = draw.generator.permutation(blocks).tolist() if shuffled else list(range(blocks))
        tables = np.zeros((len(contexts), max([-(-c // BLOCK) for c in contexts], default=0) + 1), dtype=np.int32)
        self.keys, self.values = [], []
        for i, context in enumerate(contexts):
            own = [free.pop(0) for _ in range(-(-context // BLOCK))]
            if shared and i % 2 and context >= BLOCK and contexts[i - 1] >= BLOCK:
                own[0] = int(tables[i - 1, 0])
            tables[i, : len(own)] = own
            slots = torch.tensor([own[j // BLOCK] * BLOCK + j % BLOCK for j in range(context)], dtype=torch.int64)
            k, v = (draw.tensor(context, kv_heads, head_dim, dtype=dtype) for _ in range(2))
            if shared and i % 2 and context >= BLOCK and contexts[i - 1] >= BLOCK:
                k[:BLOCK], v[:BLOCK] = self.cache.read(1, slots[:BLOCK])
            self.cache.write(1, slots, k, v)
            self.keys.append(f64(k))
            self.values.append(f64(v))
        self.lengths, self.tables = lengths, tables

    def attend(self, q: torch.Tensor, scale: float, window: int | None, padding: int = 0) -> torch.Tensor:
        step = self.machine.begin(step_input(self.lengths, tokens=q.shape[0], block_tables=self.tables), kv=self.cache)
        operator = self.machine.operator("paged_attention")
        with NoReadback(uploads=True):
            result: torch.Tensor = operator(q, self.cache, 1, step, scale, window)
        assert not result[q.shape[0] - padding :].any()
        return result

    def check(self, q: torch.Tensor, got: torch.Tensor, scale: float, window: int | None) -> None:
        expected, magnitude = np.zeros(tuple(q.shape)), np.zeros(tuple(q.shape))
        rows, token = f64(q), 0
        for i, (queries, context) in enumerate(self.lengths):
            for n in range(queries):
                index = context - queries + n
                seen = slice(0 if window is None else max(0, index - window + 1), max(0, index + 1))
                for head in range(q.shape[1]):
                    kv_head = head // (q.shape[1] // self.spec.kv_heads)
                    k, v = self.keys[i][seen, kv_head], self.values[i][seen, kv_head]
                    if len(k):
                        result = _attend(rows[token, head], k, v, scale)
                        expected[token, head], magnitude[token, head] = result
                token += 1
        assert got.dtype == q.dtype
        assert_within(got, expected, intermediate(q.dtype, magnitude), depth=64)


def take(way: tuple[int, int], patch: pytest.MonkeyPatch) -> None:
    patch.setattr(decode_plan, "COPY_BOTH_BYTES", way[0])
    patch.setattr(decode_plan, "COPY_VALUES_BYTES", way[1])


def _attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """One query over its visible keys, and the largest absolute value it averages with the slack of its scores."""
    scores = scale * (k @ q)
    p = np.exp(scores - scores.max())
    slack = 1 + np.abs(scores).max() + scale * float((np.abs(k) @ np.abs(q)).max())
    return (p / p.sum()) @ v, np.full(v.shape[-1], slack * np.abs(v).max())


@st.composite
def ragged(draw: st.DrawFn) -> Lengths:
    """Decode, whole prefills (some of them equal), chunks, sequences without a query and queries without a key."""
    lengths: Lengths = []
    for _ in range(draw(st.integers(1, 5))):
        context = draw(st.integers(0, 13))
        kind = draw(st.sampled_from(["decode", "decode", "prefill", "again", "chunk", "none", "more"]))
        if kind == "again" and lengths:
            lengths.append(lengths[-1])
            continue
        queries = {"decode": 1, "prefill": context, "again": context, "none": 0, "more": context + 2}
        lengths.append((queries.get(kind, draw(st.integers(0, context))), context))
    return lengths


@given(
    lengths=ragged(),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    head_dim=st.integers(1, 9),
    window=st.sampled_from([None, 1, 3, 20]),
    padding=st.integers(0, 2),
    dtype=st.sampled_from(DTYPES),
    shuffled=st.booleans(),
    way=st.sampled_from(WAYS),
    seed=st.integers(0, 2**32 - 1),
)
def test_paged_attention_serves_prefill_chunks_and_decode_in_one_call(
    lengths: Lengths,
    kv_heads: int,
    group: int,
    head_dim: int,
    window: int | None,
    padding: int,
    dtype: torch.dtype,
    shuffled: bool,
    way: tuple[int, int],
    seed: int,
) -> None:
    draw = Draw(seed)
    with pytest.MonkeyPatch.context() as patch:
        take(way, patch)
        patch.setattr(attention, "QUERY_TILE", 3)
        paged = Paged(lengths, kv_heads, head_dim, dtype, draw, shuffled=shuffled, shared=False)
        tokens = sum(q for q, _ in lengths) + padding
        q = draw.tensor(tokens, kv_heads * group, head_dim + 1, dtype=dtype)[..., :head_dim]
        paged.check(q, paged.attend(q, 0.7, window, padding), 0.7, window)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shuffled", [True, False])
def test_sequences_may_share_blocks(monkeypatch: pytest.MonkeyPatch, way: tuple[int, int], shuffled: bool) -> None:
    take(way, monkeypatch)
    draw = Draw(5)
    lengths = [(1, 9), (1, 9), (1, 4), (1, 7), (1, 3)]
    paged = Paged(lengths, 2, 4, torch.float32, draw, shuffled=shuffled, shared=True)
    q = draw.tensor(5, 6, 4)
    paged.check(q, paged.attend(q, 0.5, None), 0.5, None)


def test_a_tokens_result_does_not_change_from_run_to_run() -> None:
    draw = Draw(6)
    paged = Paged([(1, 9), (7, 7), (1, 12)], 2, 4, torch.float32, draw, shuffled=True, shared=False)
    q = draw.tensor(9, 4, 4)
    assert torch.equal(paged.attend(q, 0.5, None), paged.attend(q, 0.5, None))


def test_an_infinite_value_reaches_the_queries_that_see_it_and_no_other() -> None:
    draw = Draw(7)
    paged = Paged([(1, 6), (1, 9)], 1, 4, torch.float32, draw, shuffled=False, shared=False)
    slot = torch.tensor([int(paged.tables[0, 1]) * BLOCK + 1])
    k, v = paged.cache.read(1, slot)
    paged.cache.write(1, slot, k, torch.full_like(v, torch.inf))
    got = paged.attend(draw.tensor(2, 2, 4), 0.5, None)
    assert torch.isinf(got[0]).all()
    assert torch.isfinite(got[1]).all()


def test_rows_that_are_not_dense_are_copied_and_counted() -> None:
    draw = Draw(8)
    paged = Paged([(3, 3)], 2, 4, torch.float32, draw, shuffled=False, shared=False)
    q = draw.tensor(4, 3, 4).permute(1, 2, 0)[:, :, :4]
    paged.check(q, paged.attend(q, 0.5, None), 0.5, None)
    assert paged.machine.backend.ledger.counts() == {
        "copy.paged_attention.q": 1,
        "cpu.paged_attention": 1,
    }


@pytest.mark.parametrize("q", [torch.zeros(1, 3, 4), torch.zeros(1, 2, 5), torch.zeros(1, 2, 4, dtype=torch.bfloat16)])
def test_queries_that_do_not_fit_the_cache_are_refused(q: torch.Tensor) -> None:
    paged: Any = Paged([(1, 3)], 2, 4, torch.float32, Draw(9), shuffled=False, shared=False)
    with pytest.raises(OperatorError, match="paged_attention"):
        paged.attend(q, 0.5, None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("context", [1, 7, 15, 16, 17, 40])
@pytest.mark.parametrize("window", [None, 4])
def test_a_nan_query_gives_nan_in_its_own_row_and_head_only(
    dtype: torch.dtype, context: int, window: int | None
) -> None:
    draw = Draw(3)
    paged = Paged([(context, context), (1, context)], 2, 8, dtype, draw, shuffled=True, shared=False)
    q = draw.tensor(context + 1, 4, 8, dtype=dtype)
    for row in (0, context // 2, context):
        poisoned = q.clone()
        poisoned[row, 1, 3] = torch.nan
        nan = paged.attend(poisoned, 0.5, window).isnan()
        assert nan[row, 1].all()
        assert nan.sum() == 8


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("context", [1, 16, 17, 33, 49])
def test_an_infinite_query_gives_nan_in_its_own_row_and_head_only(dtype: torch.dtype, context: int) -> None:
    draw = Draw(4)
    paged = Paged([(context, context)], 2, 8, dtype, draw, shuffled=True, shared=False)
    q = draw.tensor(context, 4, 8, dtype=dtype)
    for value in (torch.inf, -torch.inf):
        for row in (0, context // 2, context - 1):
            poisoned = q.clone()
            poisoned[row, 1, 3] = value
            nan = paged.attend(poisoned, 0.5, None).isnan()
            assert nan[row, 1].all()
            assert nan.sum() == 8


def test_dense_attention_copies_and_counts_operands_of_other_strides() -> None:
    draw = Draw(12)
    backend = CpuBackend()
    q, k, v = (draw.tensor(5, heads, 4) for heads in (4, 2, 2))
    attend = backend.table()["dense_attention"][0].fn
    expected = attend(q, k, v, [0, 2, 5], 0.5, True)
    padded = torch.zeros(5, 2, 7)
    padded[:, :, :4] = k
    assert torch.equal(attend(q, padded[:, :, :4], v, [0, 2, 5], 0.5, True), expected)
    assert backend.ledger.counts() == {"cpu.dense_attention": 2, "copy.dense_attention.k": 1}
