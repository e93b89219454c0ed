"""Decides what each step computes: continuous batching under one token budget, decode first, prefill in chunks."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from polyaccel.backend.sampling import SamplingRow
from polyaccel.engine.adapter_table import AdapterTable
from polyaccel.engine.batch_state import BatchState, Role, Slots
from polyaccel.engine.messages import Capacity
from polyaccel.engine.prefix_cache import PrefixCache
from polyaccel.engine.request import Request, Sequence, sampling_row
from polyaccel.engine.waiting_queue import WaitingQueue

# Adapter mixes that are not resident and are asked for again in one step.
PARKED_TRIES = 8
# A share of the blocks that admission leaves to the sequences that run already.
RESERVE = 1 / 64
# Steps in a row that find room, after which steps may be twice as large again.
CALM = 1024


@dataclass(slots=True)
class Plan:
    """One step: the slots that decode, ordered by adapter, and (slot, tokens) for each chunk of prefill.

    ``decode`` is the same array until the batch changes.
    """

    decode: Slots
    chunks: list[tuple[int, int]] = field(default_factory=list)


class Scheduler:
    """Owns slots and blocks: who runs, who waits, and what is freed when.

    Service is first come, first served within a priority (a lower number first). When blocks run out, the last in that
    order gives up its own and computes them again later. The first is therefore always served, and it fits alone:
    nothing waits for ever.
    """

    def __init__(
        self, capacity: Capacity, state: BatchState, cache: PrefixCache, adapters: AdapterTable, max_batched_tokens: int
    ) -> None:
        self.queue = WaitingQueue(patience=max(64, 2 * capacity.request_slots))
        self.failed: list[tuple[Request, Exception]] = []
        self.begin: list[tuple[int, SamplingRow]] = []
        self.end: list[int] = []
        self.preemptions = 0
        self._vocabulary = capacity.vocabulary
        self._state = state
        self._cache = cache
        self._pool = cache.pool
        self._adapters = adapters
        self._budget = self._most = max_batched_tokens
        self._calm = 0
        self._block_size = capacity.kv_block_size
        self._reserve = int(capacity.kv_blocks * RESERVE)
        self._free_slots = list(range(capacity.request_slots - 1, -1, -1))
        self._running = 0
        self._prefilling: list[int] = []
        self._decode = np.zeros(0, dtype=np.int64)
        self._decode_changed = False
        self._completed = 0
        self._retired: dict[int, list[int]] = {}
        self._blocked: tuple[Sequence, int] | None = None

    @property
    def running(self) -> int:
        """Slots that hold a sequence, finished ones that a submitted step still names included."""
        return self._running

    # -- planning a step -----------------------------------------------------------------------------------------------

    def schedule(self, in_flight: bool) -> Plan | None:
        """The next step, its blocks allocated; None if there is nothing to submit before a result is collected.

        Sequences are preempted only when nothing is in flight: results may free blocks by themselves.
        """
        while True:
            decode = self._decode_slots()
            if not self._allocate_decode(decode):
                if in_flight:
                    return None
                self._preempt_youngest()
                continue
            plan = Plan(decode)
            budget = self._budget - len(decode)
            budget = self._continue_prefill(plan, budget)
            self._admit(plan, budget)
            if len(plan.decode) or plan.chunks:
                return plan
            if in_flight or not self._prefilling:
                return None
            self._preempt_youngest()

    def _decode_slots(self) -> Slots:
        # Never more than the budget: each of them had a token in the step before.
        if self._decode_changed:
            state = self._state
            slots = np.flatnonzero(state.role == Role.DECODE)
            self._decode = slots[np.lexsort((state.serial[slots], state.sort_key[slots]))]
            self._decode_changed = False
        return self._decode

    def _allocate_decode(self, slots: Slots) -> bool:
        state = self._state
        counts = state.block_counts[slots]
        due = counts * self._block_size <= state.computed[slots]
        missing = int(np.count_nonzero(due))
        if missing == 0:
            return True
        if missing > self._pool.available:
            return False
        state.block_tables[slots[due], counts[due]] = self._pool.take(missing)
        state.block_counts[slots[due]] += 1
        return True

    def _continue_prefill(self, plan: Plan, budget: int) -> int:
        """Next chunks of admitted prompts, oldest first; what is left of the budget."""
        for slot in self._prefilling:
            if budget == 0:
                break
            wanted = min(int(self._state.length[slot] - self._state.computed[slot]), budget)
            given = self._allocate_chunk(slot, wanted)
            if given > 0:
                plan.chunks.append((slot, given))
                budget -= given
        return budget

    def _allocate_chunk(self, slot: int, wanted: int) -> int:
        """Blocks for up to ``wanted`` more tokens of a slot; how many tokens they allow."""
        state, size = self._state, self._block_size
        computed, count = int(state.computed[slot]), int(state.block_counts[slot])
        missing = max(-(-(computed + wanted) // size) - count, 0)
        taken = min(missing, self._pool.available)
        if taken > 0:
            state.block_tables[slot, count : count + taken] = self._pool.take(taken)
            state.block_counts[slot] = count + taken
        return min(wanted, (count + taken) * size - computed)

    # -- admission -----------------------------------------------------------------------------------------------------

    def _admit(self, plan: Plan, budget: int) -> None:
        if budget == 0 or not self._free_slots or not len(self.queue):
            return
        self._retry_parked()
        while budget > 0 and self._free_slots:
            sequence = self.queue.peek()
            if sequence is None:
                return
            request = sequence.request
            if request.mix and request.adapter_slots is None:
                starving = self.queue.starving
                if self.queue.is_parked(request.mix) or starving is not None or not self._acquire(request):
                    if sequence.queued:
                        self.queue.park()
                    continue
            slot = self._place(sequence)
            if slot is None:
                return
            if slot < 0:
                continue
            given = self._allocate_chunk(slot, min(int(self._state.length[slot] - self._state.computed[slot]), budget))
            plan.chunks.append((slot, given))
            budget -= given

    def _retry_parked(self) -> None:
        for sequence in self.queue.turn(PARKED_TRIES):
            if self.queue.is_parked(sequence.request.mix) and self._acquire(sequence.request):
                self.queue.unpark(sequence.request.mix)

    def _acquire(self, request: Request) -> bool:
        try:
            slots = self._adapters.acquire(request.mix)
            if slots is None:
                return False
            request.adapter_slots = slots
            request.cache_key = self._adapters.cache_key(request.mix)
        except Exception as error:
            self._fail(request, error)
            return False
        return True

    def _fail(self, request: Request, error: Exception) -> None:
        self.failed.append((request, error))
        for sequence in request.sequences:
            if sequence.queued:
                self.queue.discard(sequence)

    def _place(self, sequence: Sequence) -> int | None:
        """Move the head of the queue into a slot: the slot, -1 if its request failed, None if blocks are short."""
        if self._blocked is not None and self._running > 0:
            blocked, needed = self._blocked
            if blocked is sequence and self._pool.available < needed:
                return None
        self._blocked = None
        request = sequence.request
        try:
            row = sampling_row(sequence, self._vocabulary)
        except Exception as error:
            self._fail(request, error)
            return -1
        blocks, digest = self._cache.lookup(request.cache_key, sequence.tokens)
        needed = -(-len(sequence.tokens) // self._block_size) - len(blocks) + self._pool.unreferenced(blocks)
        if self._running > 0:
            needed += self._reserve
        if needed > self._pool.available:
            self._blocked = sequence, needed
            return None
        self.queue.pop()
        self._pool.reference(blocks)
        slot = self._free_slots.pop()
        self._running += 1
        if sequence.admitted is None:
            sequence.cached_tokens = min(len(blocks) * self._block_size, len(request.prompt))
        self._state.admit(slot, sequence, blocks, digest)
        self._prefilling.append(slot)
        self.begin.append((slot, row))
        return slot

    # -- what steps do to slots ----------------------------------------------------------------------------------------

    def submitted(self, plan: Plan, step_id: int) -> None:
        """Account for a plan that was sent as step ``step_id``."""
        state = self._state
        decode = plan.decode
        if len(decode):
            state.computed[decode] += 1
            length = state.length[decode] + 1
            state.length[decode] = length
            state.last_step[decode] = step_id
            exhausted = length >= state.max_length[decode]
            if exhausted.any():
                state.role[decode[exhausted]] = Role.EXHAUSTED
                self._decode_changed = True
        for slot, tokens in plan.chunks:
            state.computed[slot] += tokens
            state.last_step[slot] = step_id
            if state.computed[slot] == state.length[slot]:
                state.length[slot] += 1
                more = state.length[slot] < state.max_length[slot]
                state.role[slot] = Role.DECODE if more else Role.EXHAUSTED
                self._decode_changed = True
                self._prefilling.remove(slot)

    def completed(self, step_id: int) -> None:
        """Free what waited for this step."""
        self._completed = step_id
        for slot in self._retired.pop(step_id, ()):
            self._vacate(slot)

    def retire(self, slot: int) -> None:
        """Take a finished sequence's slot out of service; it is freed once no submitted step names it."""
        state = self._state
        self._leave(slot)
        state.live[slot] = False
        last = int(state.last_step[slot])
        if last <= self._completed:
            self._vacate(slot)
        else:
            self._retired.setdefault(last, []).append(slot)

    def close(self, request: Request) -> None:
        """One sequence of the request is gone for good; after the last one its adapters are released."""
        request.open -= 1
        if request.open == 0 and request.adapter_slots is not None:
            request.adapter_slots = None
            if request.mix:
                self._adapters.release(request.mix)

    def _vacate(self, slot: int) -> None:
        sequence = self._state.sequence(slot)
        self._free(slot)
        self.close(sequence.request)

    def _free(self, slot: int) -> None:
        self._pool.release(self._state.vacate(slot))
        self._free_slots.append(slot)
        self._running -= 1
        self.end.append(slot)

    def _leave(self, slot: int) -> None:
        role = self._state.role[slot]
        if role == Role.PREFILL:
            self._prefilling.remove(slot)
        elif role == Role.DECODE:
            self._decode_changed = True
        self._state.role[slot] = Role.IDLE

    def _preempt_youngest(self) -> None:
        state = self._state
        slots = np.flatnonzero((state.role == Role.PREFILL) | (state.role == Role.DECODE))
        self._preempt(int(slots[np.lexsort((state.serial[slots], state.priority[slots]))[-1]]))
        self.preemptions += 1

    def _preempt(self, slot: int) -> None:
        state, sequence = self._state, self._state.sequence(slot)
        sequence.tokens = state.tokens[slot, : state.known[slot]].copy()
        sequence.slot = -1
        self._leave(slot)
        self._free(slot)
        self.queue.push(sequence)

    # -- memory on the device ------------------------------------------------------------------------------------------

    def make_smaller(self, slots: Slots, tokens: int) -> None:
        """Queue the sequences of steps that were not run again; no step will have more than half of ``tokens``.

        Nothing may be in flight.
        """
        for slot in slots[self._state.live[slots]].tolist():
            self._preempt(slot)
        self._calm = 0
        self._budget = max(tokens // 2, 1)

    def restore(self) -> None:
        """Steps may be as large as ever: what found no room is gone."""
        self._budget = self._most

    def found_room(self) -> None:
        """A step was run."""
        if self._budget < self._most:
            self._calm += 1
            if self._calm >= CALM:
                self._calm, self._budget = 0, min(2 * self._budget, self._most)
