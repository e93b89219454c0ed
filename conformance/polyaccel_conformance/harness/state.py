"""What a call needs beside its tensors and must not change: weights, the KV cache, adapters; and their unused room."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from polyaccel.backend import AdapterStore, KVCache, PackedAdapter, PackedEntry, SlotRange, Step, Weight
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.harness.memory import Poison, as_bits, poison_
from polyaccel_conformance.problem import Prepared, Problem

WRITES_KV = frozenset({"write_kv_cache", "qkv_rope_cache"})
"""Operators and stations that store the step's keys and values."""


def snapshot(bench: Bench, problem: Problem, prepared: Prepared) -> dict[str, torch.Tensor]:
    """Bits on the host of all state that the call has to leave as it is, by a name that says which."""
    found: dict[str, torch.Tensor] = {}
    arguments = prepared.arguments
    step = next((value for value in arguments.values() if isinstance(value, Step)), None)
    for name, value in arguments.items():
        if isinstance(value, Weight):
            found[f"weight {name!r}"] = _bits(bench.dequantize(value))
            if step is not None and step.state.adapters is not None:
                found |= _adapters(step, value, name)
        elif isinstance(value, KVCache):
            slots = _slots(bench, value, _stored(step) if problem.case.operator in WRITES_KV else None)
            for layer in range(value.spec.layers):
                k, v = value.read(layer, slots)
                found[f"layer {layer} of {name!r}"] = torch.stack((_bits(k), _bits(v)))
    bench.synchronize()
    return found


def changed(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Elements that differ, by the name of the state."""
    counts = {name: int(torch.count_nonzero(bits != after[name])) for name, bits in before.items()}
    return {name: count for name, count in counts.items() if count}


def poison_room(bench: Bench, problem: Problem, prepared: Prepared, poison: Poison) -> None:
    """Poison the KV slots that no sequence of the step reaches, for operators that only read the cache; and load an
    adapter of poison into a free slot that the step does not name."""
    step = next((value for value in prepared.arguments.values() if isinstance(value, Step)), None)
    for value in prepared.arguments.values():
        if isinstance(value, Weight) and step is not None and step.state.adapters is not None:
            _poison_slot(step, step.state.adapters, value, poison)
    bench.synchronize()
    if problem.case.operator in WRITES_KV:
        return
    for value in prepared.arguments.values():
        if isinstance(value, KVCache) and step is not None:
            slots = _slots(bench, value, _reached(step, value))
            if not len(slots):
                continue
            shape = (len(slots), value.spec.kv_heads, value.spec.head_dim)
            rows = bench.upload(poison_(torch.empty(shape, dtype=value.spec.dtype), poison))
            for layer in range(value.spec.layers):
                value.write(layer, slots, rows, rows)
            bench.synchronize()


def _poison_slot(step: Step, store: AdapterStore, weight: Weight, poison: Poison) -> None:
    ranges = store.ranges()
    filled = sorted((r.first_rank_row, r.rank_rows) for r in ranges if r is not None)
    named = {int(slot) for rows in step.input.adapters.values() for slot in rows.slots}
    free = [slot for slot, where in enumerate(ranges) if where is None and slot not in named]
    starts = [0, *(first + count for first, count in filled)]
    rows = [row for row in starts if row < store.rank_rows and all(not f <= row < f + c for f, c in filled)]
    spec = weight.spec
    if not (filled and free and rows and spec.rank_rows):
        return
    # Of rank 1, so that no store gets a larger rank by it.
    entries, size = [], 0
    for index, part in enumerate(spec.slices):
        width, height = (part.n, spec.k) if spec.lookup else (spec.k, part.n)
        for expert in (None,) if spec.experts is None else range(spec.experts):
            entries.append(
                PackedEntry(
                    site=spec.site,
                    slice=index,
                    expert=expert,
                    kind="embedding" if spec.lookup else "linear",
                    rank=1,
                    a_offset=size,
                    a_shape=(1, width),
                    b_offset=size + width,
                    b_shape=(height, 1),
                )
            )
            size += width + height
    packed = PackedAdapter(
        buffer=poison_(torch.empty(size, dtype=spec.dtype), poison), entries=tuple(entries), max_rank=1
    )
    store.write(SlotRange(slot=free[0], first_rank_row=rows[0], rank_rows=1), packed).synchronize()


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return as_bits(tensor.detach().to("cpu", copy=True).contiguous())


def _adapters(step: Step, weight: Weight, name: str) -> dict[str, torch.Tensor]:
    store = step.state.adapters
    assert store is not None
    found = {}
    experts = [None] if weight.spec.experts is None else list(range(weight.spec.experts))
    for slot, where in enumerate(store.ranges()):
        if where is None:
            continue
        for index in range(len(weight.spec.slices)):
            for expert in experts:
                matrices = store.read(weight.spec.site, index, slot, expert)
                if matrices is not None:
                    bits = torch.cat((_bits(matrices.a).reshape(-1), _bits(matrices.b).reshape(-1)))
                    found[f"slot {slot}, slice {index}, expert {expert} at {name!r}"] = bits
    return found


def _slots(bench: Bench, kv: KVCache, without: np.ndarray | None) -> torch.Tensor:
    slots = np.arange(kv.spec.blocks * kv.spec.block_size, dtype=np.int64)
    if without is not None:
        slots = np.setdiff1d(slots, without)
    return bench.upload(torch.from_numpy(slots))


def _stored(step: Step | None) -> np.ndarray | None:
    return None if step is None else step.input.kv_slots


def _reached(step: Step, kv: KVCache) -> np.ndarray:
    size = kv.spec.block_size
    reached = [step.input.kv_slots[step.input.kv_slots >= 0]]
    for table, context in zip(step.input.block_tables, step.input.context_lengths, strict=True):
        index = np.arange(context)
        reached.append(table[index // size].astype(np.int64) * size + index % size)
    return np.concatenate(reached)
