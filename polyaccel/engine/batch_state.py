"""What the host knows about every request slot, as arrays, so that a step is built without a loop over sequences."""

from __future__ import annotations

from enum import IntEnum
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from polyaccel.engine.messages import Capacity
from polyaccel.engine.philox import uniforms
from polyaccel.engine.request import Sequence

Slots = npt.NDArray[np.int64]

CHUNK = 64
_Scalar = TypeVar("_Scalar", bound=np.generic)
_NEVER = np.iinfo(np.int64).max


class Role(IntEnum):
    """What the next step may do with a slot."""

    IDLE = 0
    PREFILL = 1
    DECODE = 2
    EXHAUSTED = 3
    """Its last token has been submitted; only the result is missing."""


class BatchState:
    """Arrays ``[slots]`` unless said otherwise; a row means something from :meth:`admit` to :meth:`vacate`.

    Attributes:
        tokens: ``[slots, max_model_len]`` int32, known tokens (prompt and output).
        block_tables: ``[slots, blocks of a sequence]`` int32, unused entries 0; ``block_counts`` are in use.
        length: tokens of the sequence, those being sampled by submitted steps included.
        computed: tokens whose keys and values submitted steps cover.
        hashed: leading blocks that were offered to the prefix cache.
        prompt_length, min_length, max_length: of the whole sequence, in tokens; ids that end a sequence count above
            ``min_length`` only.
        stop_ids: ``[slots, ids]`` int64, padded with -1.
        live: the sequence has not finished. A finished one keeps its slot until no submitted step names it.
        last_step: the last step that names the slot.
        sort_key, priority, serial: first adapter slot (-1 without); seniority.
        mix_sizes, mix_slots, mix_weights: adapters of the sequence, ``[slots]`` and twice ``[slots, adapters]``.
    """

    def __init__(self, capacity: Capacity) -> None:
        count = capacity.request_slots
        self.size = count
        self.block_size = capacity.kv_block_size
        # Zeroed pages are not backed by memory before they are touched, so idle rows cost address space only.
        self.tokens = np.zeros((count, capacity.max_model_len), dtype=np.int32)
        blocks = -(-capacity.max_model_len // capacity.kv_block_size)
        self.block_tables = np.zeros((count, blocks), dtype=np.int32)
        self.block_counts = np.zeros(count, dtype=np.int64)
        self.length = np.zeros(count, dtype=np.int64)
        self.known = np.zeros(count, dtype=np.int64)
        self.computed = np.zeros(count, dtype=np.int64)
        self.hashed = np.zeros(count, dtype=np.int64)
        self.prompt_length = np.zeros(count, dtype=np.int64)
        self.min_length = np.zeros(count, dtype=np.int64)
        self.max_length = np.zeros(count, dtype=np.int64)
        self.stop_ids: npt.NDArray[np.int64] = np.full((count, 1), -1, dtype=np.int64)
        self.live = np.zeros(count, dtype=np.bool_)
        self.watched = np.zeros(count, dtype=np.bool_)
        self.role = np.zeros(count, dtype=np.int8)
        self.last_step = np.zeros(count, dtype=np.int64)
        self.sort_key = np.full(count, -1, dtype=np.int64)
        self.priority = np.zeros(count, dtype=np.int64)
        self.serial = np.zeros(count, dtype=np.int64)
        self.mix_sizes = np.zeros(count, dtype=np.int64)
        self.mix_slots: npt.NDArray[np.int32] = np.zeros((count, 1), dtype=np.int32)
        self.mix_weights: npt.NDArray[np.float32] = np.zeros((count, 1), dtype=np.float32)
        self.sequences: list[Sequence | None] = [None] * count
        self.digests: list[bytes] = [b""] * count
        self._seeds = np.zeros(count, dtype=np.uint64)
        self._choices = np.zeros(count, dtype=np.int64)
        self._uniforms = np.zeros((count, CHUNK), dtype=np.float32)
        self._uniform_base = np.zeros(count, dtype=np.int64)
        self._uniform_end = np.full(count, _NEVER, dtype=np.int64)

    def admit(self, slot: int, sequence: Sequence, blocks: list[int], digest: bytes) -> None:
        """Put a sequence into an idle slot; ``blocks`` hold its beginning already, ``digest`` is their end's."""
        request = sequence.request
        tokens = sequence.tokens
        cached = len(blocks) * self.block_size
        self.tokens[slot, : len(tokens)] = tokens
        self.block_tables[slot, : len(blocks)] = blocks
        self.block_counts[slot] = len(blocks)
        self.length[slot] = self.known[slot] = len(tokens)
        self.computed[slot] = cached
        self.hashed[slot] = len(blocks)
        self.digests[slot] = digest
        self.prompt_length[slot] = len(request.prompt)
        self.min_length[slot] = len(request.prompt) + request.params.min_tokens
        self.max_length[slot] = request.limit
        self.stop_ids = _widened(self.stop_ids, len(request.stop_ids), -1)
        self.stop_ids[slot] = -1
        self.stop_ids[slot, : len(request.stop_ids)] = request.stop_ids
        self.live[slot] = True
        self.watched[slot] = request.watched or request.params.logprobs is not None
        self.role[slot] = Role.PREFILL
        self.last_step[slot] = 0
        self.priority[slot], self.serial[slot] = sequence.order
        self._admit_adapters(slot, request.adapter_slots or ())
        self._seeds[slot] = request.seed
        self._choices[slot] = sequence.choice
        self._uniforms[slot] = 0.0
        self._uniform_base[slot] = 0
        self._uniform_end[slot] = _NEVER if request.params.temperature == 0.0 else 0
        self.sequences[slot] = sequence
        sequence.slot = slot

    def _admit_adapters(self, slot: int, adapters: tuple[tuple[int, float], ...]) -> None:
        self.mix_slots = _widened(self.mix_slots, len(adapters), 0)
        self.mix_weights = _widened(self.mix_weights, len(adapters), 0)
        self.mix_sizes[slot] = len(adapters)
        for column, (adapter_slot, weight) in enumerate(adapters):
            self.mix_slots[slot, column] = adapter_slot
            self.mix_weights[slot, column] = weight
        self.sort_key[slot] = min((entry[0] for entry in adapters), default=-1)

    def vacate(self, slot: int) -> npt.NDArray[np.int32]:
        """Empty a slot that no submitted step names; returns its blocks."""
        count = int(self.block_counts[slot])
        blocks = self.block_tables[slot, :count].copy()
        self.block_tables[slot, :count] = 0
        self.block_counts[slot] = 0
        self.live[slot] = False
        self.role[slot] = Role.IDLE
        self.mix_sizes[slot] = 0
        self._uniform_end[slot] = _NEVER
        self.sequences[slot] = None
        return blocks

    def sequence(self, slot: int) -> Sequence:
        sequence = self.sequences[slot]
        if sequence is None:
            raise LookupError(f"request slot {slot} is empty")
        return sequence

    def output(self, slot: int) -> npt.NDArray[np.int32]:
        """The known output tokens of a slot (a view)."""
        return self.tokens[slot, self.prompt_length[slot] : self.known[slot]]

    def draw(self, slots: Slots, index: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """The random numbers of tokens ``index`` of their sequences, 0 for greedy ones; drawn ahead in chunks."""
        ends = self._uniform_end[slots]
        if (ends <= index).any():
            # Whoever is through half of a chunk draws along: one call serves the batch for half a chunk at least.
            due = (ends - CHUNK // 2 <= index) & (ends != _NEVER)
            who, start = slots[due], index[due]
            places = start[:, None] + np.arange(CHUNK)
            self._uniforms[who] = uniforms(self._seeds[who, None], self._choices[who, None], places)
            self._uniform_base[who] = start
            self._uniform_end[who] = start + CHUNK
        drawn: npt.NDArray[np.float32] = self._uniforms[slots, (index - self._uniform_base[slots]) & (CHUNK - 1)]
        return drawn


def _widened(array: npt.NDArray[_Scalar], columns: int, fill: int) -> npt.NDArray[_Scalar]:
    missing = columns - array.shape[1]
    if missing <= 0:
        return array
    return np.concatenate((array, np.full((len(array), missing), fill, dtype=array.dtype)), axis=1)
