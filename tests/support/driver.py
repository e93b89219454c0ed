"""Drives a model through prefill, chunked prefill and decode with steps built by hand: no engine involved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from polyaccel.backend.adapter_store import AdapterStore
from polyaccel.backend.backend import Backend
from polyaccel.backend.communicator import Communicator
from polyaccel.backend.plan import Plan
from polyaccel.backend.step import AdapterRows, DeviceState, RowSet, StepInput, TokenClass
from polyaccel.models.model import Model

BLOCK_SIZE, BLOCKS = 4, 64
Mix = tuple[tuple[int, float], ...]
"""(slot, weight) pairs of a sequence."""


@dataclass
class CachedSequence:
    """A sequence's blocks and how many of its tokens are in the cache."""

    blocks: list[int] = field(default_factory=list)
    length: int = 0


class StepDriver:
    """One rank's model with its plan, caches and sequences. Blocks are handed out in a shuffled order."""

    def __init__(self, model: Model, comm: Communicator, *, slots: int = 0, policy: str = "allow") -> None:
        self.model = model
        self.backend: Backend = model.options.backend
        self.plan = Plan(self.backend, model.requests(), policy=policy)  # type: ignore[arg-type]
        model.bind(self.plan, comm)
        several = len(model.devices) > 1
        dtype = model.options.dtype
        self.states: dict[int, DeviceState] = {}
        caches = {}
        for device in model.devices:
            spec = model.kv_spec(BLOCKS, BLOCK_SIZE, dtype, device.index if several else None)
            caches[device.index] = self.backend.allocate_kv(spec, device)
            store = self._store(device.index, slots) if slots else None
            self.states[device.index] = DeviceState(kv=caches[device.index], adapters=store)
        model.bind_kv(caches if several else caches[model.devices[0].index])
        self._free = np.random.default_rng(0).permutation(BLOCKS).tolist()
        self._sequences: dict[int, CachedSequence] = {}

    def _store(self, index: int, slots: int) -> AdapterStore:
        device = next(device for device in self.model.devices if device.index == index)
        weights = self.model.weights(index)
        return self.backend.allocate_adapters(
            weights, rank_rows=self.model.options.rank_rows, slots=slots, device=device
        )

    def stores(self) -> dict[int, AdapterStore]:
        """The adapter stores by device index."""
        return {index: state.adapters for index, state in self.states.items() if state.adapters is not None}

    def step(
        self, chunks: Mapping[int, Sequence[int]], *, last_only: bool = False, mixes: Mapping[int, Mix] | None = None
    ) -> torch.Tensor:
        """Append tokens to each sequence; logits of every token, or of each sequence's last, in the order of chunks."""
        inputs = self.inputs(chunks, last_only=last_only, mixes=mixes or {})
        steps = {
            device.index: self.backend.begin_step(inputs, self.states[device.index], device)
            for device in self.model.devices
        }
        return self.model.forward(steps)

    def inputs(self, chunks: Mapping[int, Sequence[int]], *, last_only: bool, mixes: Mapping[int, Mix]) -> StepInput:
        ids: list[int] = []
        positions: list[int] = []
        kv_slots: list[int] = []
        logits_rows: list[int] = []
        starts, contexts = [0], []
        tables: list[list[int]] = []
        triples: list[tuple[int, int, float]] = []
        for number, tokens in chunks.items():
            sequence = self._sequences.setdefault(number, CachedSequence())
            where = range(sequence.length, sequence.length + len(tokens))
            while len(sequence.blocks) * BLOCK_SIZE < where.stop:
                sequence.blocks.append(self._free.pop())
            triples += [
                (len(ids) + i, slot, weight) for i in range(len(tokens)) for slot, weight in mixes.get(number, ())
            ]
            logits_rows += [len(ids) + i for i in range(len(tokens)) if not last_only or i == len(tokens) - 1]
            ids += list(tokens)
            positions += list(where)
            kv_slots += [sequence.blocks[i // BLOCK_SIZE] * BLOCK_SIZE + i % BLOCK_SIZE for i in where]
            starts.append(len(ids))
            contexts.append(where.stop)
            sequence.length = where.stop
            tables.append(list(sequence.blocks))
        width = max(len(table) for table in tables)
        row_of = {row: i for i, row in enumerate(logits_rows)}
        adapters: dict[RowSet, AdapterRows] = {
            "tokens": _rows(triples),
            "logits": _rows([(row_of[row], slot, weight) for row, slot, weight in triples if row in row_of]),
        }
        decode = len(ids) == len(chunks)
        sequences = len(chunks)
        return StepInput(
            token_class=TokenClass.DECODE if decode else TokenClass.MIXED,
            token_ids=np.array(ids, dtype=np.int64),
            positions=np.array(positions, dtype=np.int64),
            query_starts=np.array(starts, dtype=np.int32),
            context_lengths=np.array(contexts, dtype=np.int32),
            block_tables=np.array([table + [0] * (width - len(table)) for table in tables], dtype=np.int32),
            kv_slots=np.array(kv_slots, dtype=np.int64),
            request_slots=np.arange(sequences, dtype=np.int32),
            logits_rows=np.array(logits_rows, dtype=np.int32),
            sample_slots=np.zeros(len(logits_rows), dtype=np.int32),
            uniforms=np.zeros(len(logits_rows), dtype=np.float32),
            adapters=adapters,
        )


def _rows(triples: list[tuple[int, int, float]]) -> AdapterRows:
    columns = list(zip(*triples, strict=True)) if triples else [(), (), ()]
    return AdapterRows.build(
        np.array(columns[0], dtype=np.int32),
        np.array(columns[1], dtype=np.int32),
        np.array(columns[2], dtype=np.float32),
    )
