"""Turns a plan into the arrays of a step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from polyaccel.backend.step import AdapterRows, RowSet, StepInput, TokenClass
from polyaccel.engine.batch_state import BatchState, Slots
from polyaccel.engine.scheduler import Plan

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class BuiltStep:
    """A step and what its result means for the batch.

    ``slots`` and ``computed`` (S): the sequences, and the tokens whose keys and values exist once the step has run.
    ``sampled`` and ``index`` (R): the slots of the rows of logits, and the places of their new tokens.
    """

    inputs: StepInput
    slots: Slots
    computed: Ints
    sampled: Slots
    index: Ints


class _DecodeBatch:
    """What stays the same as long as the same sequences decode."""

    def __init__(self, state: BatchState, slots: Slots) -> None:
        count = len(slots)
        self.slots = slots
        self.slots32 = slots.astype(np.int32)
        self.rows = np.arange(count, dtype=np.int32)
        self.starts = np.arange(count + 1, dtype=np.int32)
        self.sources = -1 - slots
        rows = _adapter_rows(state, slots, self.starts.astype(np.int64))
        self.adapters: dict[RowSet, AdapterRows] = {} if rows is None else {"tokens": rows, "logits": rows}


class StepBuilder:
    """Builds steps from the batch state and changes nothing in it but the random numbers drawn ahead.

    Arrays belong to the step, except that ``AdapterRows`` are one object for as long as the same sequences decode.
    """

    def __init__(self, state: BatchState) -> None:
        self._state = state
        self._decode = _DecodeBatch(state, np.zeros(0, dtype=np.int64))

    def build(self, plan: Plan) -> BuiltStep:
        return self._build_mixed(plan) if plan.chunks else self._build_decode(plan.decode)

    def _build_decode(self, slots: Slots) -> BuiltStep:
        state = self._state
        if self._decode.slots is not slots:
            self._decode = _DecodeBatch(state, slots)
        batch = self._decode
        positions = state.computed[slots]
        index = positions + 1
        token_ids = np.where(state.known[slots] > positions, state.tokens[slots, positions], batch.sources)
        tables = self._block_tables(slots)
        blocks, offsets = np.divmod(positions, state.block_size)
        kv_slots = tables[batch.rows, blocks] * np.int64(state.block_size) + offsets
        inputs = StepInput(
            token_class=TokenClass.DECODE,
            token_ids=token_ids,
            positions=positions,
            query_starts=batch.starts.copy(),
            context_lengths=index.astype(np.int32),
            block_tables=tables,
            kv_slots=kv_slots,
            request_slots=batch.slots32.copy(),
            logits_rows=batch.rows.copy(),
            sample_slots=batch.slots32.copy(),
            uniforms=state.draw(slots, index),
            adapters=dict(batch.adapters),
        )
        return BuiltStep(inputs, slots, index, slots, index)

    def _build_mixed(self, plan: Plan) -> BuiltStep:
        state = self._state
        chunk_slots, chunk_counts = np.array(plan.chunks, dtype=np.int64).T
        slots = np.concatenate((plan.decode, chunk_slots))
        counts = np.concatenate((np.ones(len(plan.decode), dtype=np.int64), chunk_counts))
        order = np.lexsort((state.serial[slots], state.sort_key[slots]))
        slots, counts = slots[order], counts[order]
        first = state.computed[slots]
        computed = first + counts
        starts = np.concatenate(([0], np.cumsum(counts)))
        rows = np.repeat(np.arange(len(slots)), counts)
        positions = np.arange(starts[-1]) + (first - starts[:-1])[rows]
        row_slots = slots[rows]
        token_ids = np.where(state.known[row_slots] > positions, state.tokens[row_slots, positions], -1 - row_slots)
        tables = self._block_tables(slots)
        blocks, offsets = np.divmod(positions, state.block_size)
        ready = np.flatnonzero(computed == state.length[slots])
        sampled, index = slots[ready], computed[ready]
        inputs = StepInput(
            token_class=TokenClass.DECODE if len(ready) == len(slots) == len(rows) else TokenClass.MIXED,
            token_ids=token_ids,
            positions=positions,
            query_starts=starts.astype(np.int32),
            context_lengths=computed.astype(np.int32),
            block_tables=tables,
            kv_slots=tables[rows, blocks] * np.int64(state.block_size) + offsets,
            request_slots=slots.astype(np.int32),
            logits_rows=(starts[1:][ready] - 1).astype(np.int32),
            sample_slots=sampled.astype(np.int32),
            uniforms=state.draw(sampled, index),
            adapters=self._adapters(slots, starts, sampled),
        )
        return BuiltStep(inputs, slots, computed, sampled, index)

    def _block_tables(self, slots: Slots) -> npt.NDArray[np.int32]:
        state = self._state
        width = int(state.block_counts[slots].max())
        return np.take(state.block_tables[:, :width], slots, axis=0)

    def _adapters(self, slots: Slots, starts: Ints, sampled: Slots) -> dict[RowSet, AdapterRows]:
        tokens = _adapter_rows(self._state, slots, starts)
        if tokens is None:
            return {}
        logits = _adapter_rows(self._state, sampled, np.arange(len(sampled) + 1))
        return {"tokens": tokens, "logits": logits or AdapterRows()}


def _adapter_rows(state: BatchState, slots: Slots, starts: Ints) -> AdapterRows | None:
    """Triples of rows ``starts[i]:starts[i + 1]`` of each sequence; None if none has an adapter."""
    sizes = state.mix_sizes[slots]
    if not sizes.any():
        return None
    # A sequence's rows occur once for each of its adapters, adapters varying slowest within the sequence.
    column = np.arange(state.mix_slots.shape[1])
    who, which = np.nonzero(column[None, :] < sizes[:, None])
    lengths = (starts[1:] - starts[:-1])[who]
    ends = np.cumsum(lengths)
    rows = np.arange(ends[-1]) + np.repeat(starts[:-1][who] - (ends - lengths), lengths)
    adapter_slots = np.repeat(state.mix_slots[slots[who], which], lengths)
    weights = np.repeat(state.mix_weights[slots[who], which], lengths)
    # Rows ascend within each adapter already, so build's stable sort by slot gives the order of the contract.
    return AdapterRows.build(rows.astype(np.int32), adapter_slots, weights)
