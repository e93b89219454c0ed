"""What a call needs beside its tensors and must not change: weights, the KV cache, adapters; and their unused room."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

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
    step = _step_of(prepared)
    stored = np.empty(0, dtype=np.int64)
    if step is not None and problem.case.operator in WRITES_KV:
        stored = step.input.kv_slots
    adapters: dict[str, list[torch.Tensor]] = {}
    for name, value in arguments.items():
        if isinstance(value, Weight):
            found[f"weight {name!r}"] = _bits(bench.dequantize(value))
            if step is not None and step.state.adapters is not None:
                _adapters(step.state.adapters, value, adapters)
        elif isinstance(value, KVCache):
            slots = bench.upload(torch.from_numpy(rest_of(_slots(value), stored)))
            for layer in range(value.spec.layers):
                k, v = value.read(layer, slots)
                found[f"layer {layer} of {name!r}"] = torch.stack((_bits(k), _bits(v)))
    # One copy a slot: there are many small matrices.
    found |= {name: _bits(torch.cat(parts)) for name, parts in adapters.items()}
    bench.synchronize()
    return found


def changed(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Elements that differ, by the name of the state."""
    counts = {name: _differing(bits, after.get(name)) for name, bits in before.items()}
    return {name: count for name, count in counts.items() if count}


def _differing(bits: torch.Tensor, other: torch.Tensor | None) -> int:
    if other is None or other.shape != bits.shape:
        return bits.numel()
    # A cache has many elements: numpy compares them several times faster than torch.
    return int(np.count_nonzero(bits.numpy() != other.numpy()))


class Room:
    """What a call must not depend on: the KV slots that no sequence of the step reaches, for operators that only read
    the cache, and a free adapter slot that the step does not name. Found once, poisoned as often as need be."""

    def __init__(self, bench: Bench, problem: Problem, prepared: Prepared) -> None:
        self._bench = bench
        self._adapters: tuple[AdapterStore, SlotRange] | None = None
        self._weights: list[Weight] = []
        self._entries: tuple[PackedEntry, ...] = ()
        self._elements = 0
        self._caches: list[tuple[KVCache, np.ndarray]] = []
        step = _step_of(prepared)
        if step is None:
            return
        for value in prepared.arguments.values():
            if isinstance(value, Weight) and value.spec.rank_rows:
                self._weights.append(value)
            elif isinstance(value, KVCache) and problem.case.operator not in WRITES_KV:
                slots = rest_of(_slots(value), _reached(step, value))
                if len(slots):
                    self._caches.append((value, slots))
        store = step.state.adapters
        where = None if store is None or not self._weights else _free_slot(step, store)
        if store is not None and where is not None:
            self._adapters = (store, where)
            # Of rank 1, so that no store gets a larger rank by it.
            self._entries, self._elements = laid_out(self._weights, 1)

    def poison(self, poison: Poison) -> None:
        """Write it."""
        if self._adapters is not None:
            store, where = self._adapters
            buffer = poison_(torch.empty(self._elements, dtype=self._weights[0].spec.dtype), poison)
            store.write(where, PackedAdapter(buffer=buffer, entries=self._entries, max_rank=1))
        for kv, slots in self._caches:
            shape = (len(slots), kv.spec.kv_heads, kv.spec.head_dim)
            rows = self._bench.upload(poison_(torch.empty(shape, dtype=kv.spec.dtype), poison))
            on_device = self._bench.upload(torch.from_numpy(slots))
            for layer in range(kv.spec.layers):
                kv.write(layer, on_device, rows, rows)


def _free_slot(step: Step, store: AdapterStore) -> SlotRange | None:
    """A slot that holds nothing and one rank row of nobody, beside others that hold something."""
    ranges = store.ranges()
    filled = sorted((r.first_rank_row, r.rank_rows) for r in ranges if r is not None)
    named = {int(slot) for rows in step.input.adapters.values() for slot in rows.slots}
    free = [slot for slot, where in enumerate(ranges) if where is None and slot not in named]
    starts = [0, *(first + count for first, count in filled)]
    rows = [row for row in starts if row < store.rank_rows and all(not f <= row < f + c for f, c in filled)]
    if not (filled and free and rows):
        return None
    return SlotRange(slot=free[0], first_rank_row=rows[0], rank_rows=1)


def laid_out(weights: Iterable[Weight], rank: int) -> tuple[tuple[PackedEntry, ...], int]:
    """Where the matrices of an adapter of this rank for all slices and experts of the weights lie, one after the other,
    A before B; and how many elements that are."""
    entries: list[PackedEntry] = []
    size = 0
    for spec in (weight.spec for weight in weights):
        for index, part in enumerate(spec.slices):
            width, height = (part.n, spec.k) if spec.lookup else (spec.k, part.n)
            for expert in (None,) if spec.experts is None else range(spec.experts):
                entries.append(
                    PackedEntry(
                        site=spec.site,
                        slice=index,
                        expert=expert,
                        kind="embedding" if spec.lookup else "linear",
                        rank=rank,
                        a_offset=size,
                        a_shape=(rank, width),
                        b_offset=size + rank * width,
                        b_shape=(height, rank),
                    )
                )
                size += rank * (width + height)
    return tuple(entries), size


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return as_bits(tensor.detach().to("cpu", copy=True).contiguous())


def _adapters(store: AdapterStore, weight: Weight, found: dict[str, list[torch.Tensor]]) -> None:
    """Add the matrices of each filled slot at a weight."""
    experts = [None] if weight.spec.experts is None else list(range(weight.spec.experts))
    for slot, where in enumerate(store.ranges()):
        if where is None:
            continue
        for index in range(len(weight.spec.slices)):
            for expert in experts:
                matrices = store.read(weight.spec.site, index, slot, expert)
                if matrices is not None:
                    found.setdefault(f"adapter slot {slot}", []).extend(
                        (matrices.a.reshape(-1), matrices.b.reshape(-1))
                    )


def rest_of(count: int, slots: np.ndarray) -> np.ndarray:
    """The slots ``0:count`` but these, of which -1 is none."""
    free = np.ones(count, dtype=np.bool_)
    free[slots[slots >= 0]] = False
    return np.flatnonzero(free)


def _step_of(prepared: Prepared) -> Step | None:
    return next((value for value in prepared.arguments.values() if isinstance(value, Step)), None)


def _slots(kv: KVCache) -> int:
    return kv.spec.blocks * kv.spec.block_size


def _reached(step: Step, kv: KVCache) -> np.ndarray:
    size = kv.spec.block_size
    reached = [step.input.kv_slots[step.input.kv_slots >= 0]]
    for table, context in zip(step.input.block_tables, step.input.context_lengths, strict=True):
        index = np.arange(context)
        reached.append(table[index // size].astype(np.int64) * size + index % size)
    return np.concatenate(reached)
