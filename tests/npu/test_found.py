"""Failures that others have met on Ascend, which must be impossible or said loudly here."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyaccel.backend import Plan, Query, SiteRequest, Slice, TokenClass, UnsupportedError, WeightSpec
from polyaccel.backend.adapter_store import PackedAdapter, PackedEntry, SlotRange
from polyaccel.backend.step import AdapterRows, DeviceState, StepInput
from polyaccel_npu.backend import NpuBackend
from polyaccel_npu.chip import chip_of
from polyaccel_npu.support import supports


def packed(site: str, widths: Sequence[int], k: int, rank: int, seed: int) -> PackedAdapter:
    """An adapter of one rank on every slice."""
    generator = torch.Generator().manual_seed(seed)
    entries, parts, at = [], [], 0
    for index, n in enumerate(widths):
        a, b = torch.randn(rank, k, generator=generator), torch.randn(n, rank, generator=generator)
        entries.append(
            PackedEntry(
                site=site,
                slice=index,
                expert=None,
                kind="linear",
                rank=rank,
                a_offset=at,
                a_shape=(rank, k),
                b_offset=at + a.numel(),
                b_shape=(n, rank),
            )
        )
        parts += [a.flatten() * 0.1, b.flatten() * 0.1]
        at += a.numel() + b.numel()
    return PackedAdapter(buffer=torch.cat(parts), entries=tuple(entries), max_rank=rank)


def step_of(rows: np.ndarray, slots: np.ndarray, tokens: int) -> StepInput:
    ids = np.zeros(tokens, dtype=np.int64)
    small = np.zeros(0, dtype=np.int32)
    return StepInput(
        token_class=TokenClass.MIXED,
        token_ids=ids,
        positions=ids,
        query_starts=np.zeros(1, dtype=np.int32),
        context_lengths=small,
        block_tables=np.zeros((0, 1), dtype=np.int32),
        kv_slots=ids - 1,
        request_slots=small,
        logits_rows=np.zeros(0, dtype=np.int64),
        sample_slots=small,
        uniforms=np.zeros(0, dtype=np.float32),
        adapters={"tokens": AdapterRows.build(rows, slots, np.ones(len(rows), dtype=np.float32))},
    )


@given(
    ranks=st.lists(st.sampled_from([1, 2, 7, 8, 33, 128, 256, 512]), min_size=1, max_size=3),
    widths=st.lists(st.integers(1, 24), min_size=1, max_size=3),
    k=st.integers(1, 40),
    tokens=st.integers(1, 8),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=30)
def test_slices_narrower_than_the_rank_are_right_at_every_rank(
    ranks: list[int], widths: list[int], k: int, tokens: int, dtype: torch.dtype, seed: int
) -> None:
    """vllm-ascend 16586: merged columns cut over ranks are narrower than the rank, and the expand aborts or hangs."""
    backend = NpuBackend()
    device = backend.devices()[0]
    slices = tuple(Slice(name=str(i), n=n) for i, n in enumerate(widths))
    spec = WeightSpec(site="s", slices=slices, k=k, dtype=dtype, rank_rows=sum(ranks))
    weight = backend.allocate_weight(spec, device)
    weight.seal()
    store = backend.allocate_adapters({"s": weight}, rank_rows=sum(ranks), slots=len(ranks), device=device)
    first = 0
    for slot, rank in enumerate(ranks):
        store.write(
            SlotRange(slot=slot, first_rank_row=first, rank_rows=rank), packed("s", widths, k, rank, seed + slot)
        )
        first += rank
    generator = np.random.default_rng(seed)
    rows = np.flatnonzero(generator.random(tokens) < 0.8).astype(np.int32)
    slots = generator.integers(0, len(ranks), len(rows)).astype(np.int32)
    step = backend.begin_step(step_of(rows, slots, tokens), DeviceState(adapters=store), device)
    x, y = (torch.from_numpy(generator.standard_normal((tokens, n))).to(dtype) for n in (k, spec.n))
    found = backend.table()["sgmv"][0].fn(device.upload(y), device.upload(x), weight, step).cpu()
    wanted = y.double()
    for row, slot in zip(rows, slots, strict=True):
        for i in range(len(widths)):
            own = packed("s", widths, k, ranks[slot], seed + int(slot)).entries[i]
            made = packed("s", widths, k, ranks[slot], seed + int(slot))
            delta = made.b(own).to(dtype).double() @ (made.a(own).to(dtype).double() @ x[row].double())
            wanted[row, spec.starts[i] : spec.starts[i + 1]] += delta
    unit = torch.finfo(dtype).eps
    assert torch.allclose(found.double(), wanted, rtol=4 * unit, atol=40 * unit)
    untouched = np.setdiff1d(np.arange(tokens), rows)
    assert torch.equal(found[untouched], y[untouched])
    assert not [name for name in backend.ledger.counts() if name.startswith("composite.")]


@pytest.mark.parametrize("rank", [8, 128, 512])
def test_310p_says_that_it_does_not_group_adapters_instead_of_switching_silently(rank: int) -> None:
    """vllm-ascend 3930 and its twin: on 310P, and from rank 128 on, LoRA runs as plain torch and nobody is told."""
    query = Query(
        site="qkv",
        operator="sgmv",
        token_class=TokenClass.DECODE,
        adapters=True,
        static={"dtype": "float16", "largest_rank": rank, "k": 64, "slices": (64, 64)},
    )
    assert supports("sgmv", chip_of("Ascend910B3"))(query) == []
    (reason,) = supports("sgmv", chip_of("Ascend310P3"))(query)
    assert "310P" in reason


def test_strict_refuses_what_would_run_as_a_composite(backend: NpuBackend) -> None:
    request = SiteRequest(site="a", operator="paged_attention", static={"dtype": "float32", "head_dim": 64})
    with pytest.raises(UnsupportedError, match="FIA takes float16 and bfloat16"):
        Plan(backend, [request], policy="strict")
