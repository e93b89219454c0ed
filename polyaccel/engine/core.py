"""The engine core: requests in, tokens out, one step at a time."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from polyaccel.backend.errors import ConfigurationError, EngineDead, OutOfMemory, RequestRejected
from polyaccel.backend.sampling import SamplingRow
from polyaccel.engine.adapter_table import AdapterTable, NoAdapters
from polyaccel.engine.batch_state import BatchState
from polyaccel.engine.events import FinishEvent, StepEvents
from polyaccel.engine.executor import Executor
from polyaccel.engine.intake import Intake, PromptIds
from polyaccel.engine.messages import StepMessage, StepResult
from polyaccel.engine.outputs import FinishReason
from polyaccel.engine.prefix_cache import PrefixCache, enter_filled_blocks
from polyaccel.engine.request import Request, Sequence
from polyaccel.engine.results import finish_event, token_event
from polyaccel.engine.sampling_params import SamplingParams
from polyaccel.engine.scheduler import Plan, Scheduler
from polyaccel.engine.step_builder import BuiltStep, StepBuilder
from polyaccel.lora.mix import AdapterMix

logger = logging.getLogger("polyaccel.engine")


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreStats:
    """A snapshot. ``running`` counts sequences in request slots; hits and queries count prompt tokens; ``no_room``
    counts steps that were not run for want of memory on the device."""

    running: int
    waiting: int
    kv_blocks: int
    kv_blocks_used: int
    cached_blocks: int
    preemptions: int
    prefix_queries: int
    prefix_hits: int
    steps: int
    no_room: int


class EngineCore:
    """Schedules requests onto an executor. Not thread-safe: one thread owns it and calls :meth:`step` while
    :attr:`has_work`.

    With ``overlap`` a step is submitted before the one before it is collected; the tokens are the same either way.
    """

    def __init__(
        self,
        executor: Executor,
        adapters: AdapterTable | None = None,
        *,
        eos_token_ids: Items[int] = (),
        overlap: bool = True,
        max_batched_tokens: int = 2048,
        prefix_caching: bool = True,
        seed: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """``seed`` starts the generator from which requests without a seed get theirs, in order of arrival.

        Raises:
            ConfigurationError: a budget below 1, or workers without room for one block and one request.
        """
        capacity = executor.capacity
        if max_batched_tokens < 1:
            raise ConfigurationError(f"max_batched_tokens={max_batched_tokens} must be at least 1")
        if min(capacity.kv_blocks, capacity.kv_block_size, capacity.request_slots, capacity.max_model_len) < 1:
            raise ConfigurationError(f"the workers have no room for a single request: {capacity}")
        self._executor = executor
        self._intake = Intake(
            vocabulary=capacity.vocabulary,
            max_tokens=min(capacity.max_model_len, capacity.kv_blocks * capacity.kv_block_size),
            eos_token_ids=eos_token_ids,
            seed=seed,
        )
        self._depth = 1 if overlap else 0
        self._clock = clock
        self._state = BatchState(capacity)
        self._cache = PrefixCache(capacity.kv_blocks, capacity.kv_block_size, enabled=prefix_caching)
        self._scheduler = Scheduler(capacity, self._state, self._cache, adapters or NoAdapters(), max_batched_tokens)
        self._builder = StepBuilder(self._state)
        self._requests: dict[str, Request] = {}
        self._in_flight: deque[tuple[int, BuiltStep]] = deque()
        self._steps = 0
        self._prefix_queries = 0
        self._prefix_hits = 0
        self._no_room = 0
        self._resumes = False
        self._error: EngineDead | None = None

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest sequence that can be served, prompt included."""
        return self._intake.max_tokens

    # -- requests ------------------------------------------------------------------------------------------------------

    def add_request(
        self,
        request_id: str,
        prompt_ids: PromptIds,
        params: SamplingParams,
        mix: AdapterMix = (),
        *,
        priority: int = 0,
        watched: bool = False,
    ) -> None:
        """Queue a request.

        ``mix`` is resolved by the adapter table. A lower ``priority`` is served first. With ``watched``, every token
        gives a :class:`~polyaccel.engine.events.TokenEvent` (streaming, stop strings); otherwise tokens are seen in the
        finish event only, which costs the steps nothing.

        Raises:
            RequestRejected: an empty prompt, an id outside the vocabulary, a request id in use.
            RequestTooLong: prompt and max_tokens exceed what one sequence may hold.
            EngineDead: the engine has failed before.
        """
        if self._error is not None:
            raise self._error
        if request_id in self._requests:
            raise RequestRejected(f"request id {request_id!r} is in use; give every request its own")
        request = self._intake.request(
            request_id, prompt_ids, params, mix, priority=priority, watched=watched, now=self._clock()
        )
        self._requests[request_id] = request
        # The other choices follow once the first one's prompt is in the prefix cache.
        self._scheduler.queue.push(request.sequences[0])

    def abort(self, request_id: str) -> list[FinishEvent]:
        """End every open choice of a request now. Unknown and finished requests are left alone: an empty list.

        The events are returned here and not repeated by :meth:`step`.
        """
        request = self._requests.get(request_id)
        return [] if request is None else self._finish_all(request, "abort")

    def finish(self, request_id: str, choice: int, stop_reason: int | str | None) -> FinishEvent | None:
        """End one choice because its text matched a stop string. None if it has ended already.

        The event is returned here and not repeated by :meth:`step`.
        """
        request = self._requests.get(request_id)
        if request is None or request.sequences[choice].finished:
            return None
        return self._finish(request.sequences[choice], "stop", stop_reason)

    def clear_prefix_cache(self) -> None:
        """Forget all cached keys and values, as after a change of the weights."""
        self._cache.clear()

    @property
    def has_work(self) -> bool:
        """Requests are open or results outstanding."""
        return bool(self._requests) or bool(self._in_flight)

    @property
    def error(self) -> EngineDead | None:
        """Why the engine cannot go on, once it cannot."""
        return self._error

    def stats(self) -> CoreStats:
        return CoreStats(
            running=self._scheduler.running,
            waiting=len(self._scheduler.queue),
            kv_blocks=self._cache.pool.blocks,
            kv_blocks_used=self._cache.pool.used,
            cached_blocks=len(self._cache),
            preemptions=self._scheduler.preemptions,
            prefix_queries=self._prefix_queries,
            prefix_hits=self._prefix_hits,
            steps=self._steps,
            no_room=self._no_room,
        )

    # -- steps ---------------------------------------------------------------------------------------------------------

    def step(self) -> StepEvents:
        """Submit the next step if there is one, and collect the oldest result once enough are outstanding.

        Blocks in the executor's ``collect`` only. A step for which the device has no memory is done again as smaller
        ones; a request of which not even one token fits ends with an error event that carries OutOfMemory. When the
        executor fails, every open request ends with an error event that carries the
        :class:`~polyaccel.backend.errors.EngineDead`; later calls do nothing.
        """
        events = StepEvents()
        if self._error is not None:
            return events
        try:
            plan = self._schedule(events)
            while plan is None and self._in_flight:
                self._collect(events)
                plan = self._schedule(events)
            if plan is not None:
                self._submit(plan)
                events.submitted = True
            if len(self._in_flight) > self._depth:
                self._collect(events)
        except Exception as error:
            self._die(error, events)
        return events

    def _schedule(self, events: StepEvents) -> Plan | None:
        plan = self._scheduler.schedule(bool(self._in_flight))
        if self._scheduler.failed:
            failed, self._scheduler.failed = self._scheduler.failed, []
            for request, error in failed:
                events.finished += self._finish_all(request, "error", error)
        return plan

    def _submit(self, plan: Plan) -> None:
        scheduler = self._scheduler
        built = self._builder.build(plan)
        self._steps += 1
        begin: tuple[tuple[int, SamplingRow], ...] = ()
        if scheduler.begin:
            begin, scheduler.begin = tuple(scheduler.begin), []
            self._note_admissions(begin)
        end, scheduler.end = tuple(scheduler.end), []
        resumes, self._resumes = self._resumes, False
        self._executor.submit(
            StepMessage(step_id=self._steps, inputs=built.inputs, begin=begin, end=end, resumes=resumes)
        )
        scheduler.submitted(plan, self._steps)
        self._in_flight.append((self._steps, built))

    def _note_admissions(self, begin: tuple[tuple[int, SamplingRow], ...]) -> None:
        now = self._clock()
        for slot, _ in begin:
            sequence = self._state.sequence(slot)
            if sequence.admitted is None:
                sequence.admitted = now
                self._prefix_queries += len(sequence.request.prompt)
                self._prefix_hits += sequence.cached_tokens

    def _collect(self, events: StepEvents) -> None:
        state = self._state
        result = self._executor.collect()
        step_id, built = self._in_flight.popleft()
        if result.no_room and result.step_id == step_id:
            self._make_room(step_id, built, result.no_room, events)
            return
        self._scheduler.found_room()
        slots, index, ids = built.sampled, built.index, np.asarray(result.ids, dtype=np.int64)
        if result.step_id != step_id or ids.shape != slots.shape:
            raise EngineDead(
                f"step {step_id} with {len(slots)} rows of logits was answered as step {result.step_id} with ids of "
                f"shape {list(ids.shape)}: the executor lost its order"
            )
        events.collected = True
        rows: npt.NDArray[np.int64] | None = None
        live = state.live[slots]
        if not live.all():
            rows = np.flatnonzero(live)
            slots, index, ids = slots[rows], index[rows], ids[rows]
        known = index + 1
        state.tokens[slots, index] = ids
        state.known[slots] = known
        enter_filled_blocks(self._cache, state, built.slots, built.computed)
        stopped = (state.stop_ids[slots] == ids[:, None]).any(axis=1) & (known > state.min_length[slots])
        ended = stopped | (known >= state.max_length[slots])
        first = index == state.prompt_length[slots]
        if first.any():
            self._note_first_tokens(slots[first])
        watched = state.watched[slots]
        if watched.any():
            self._report(events, result, rows, slots, ids, watched)
        # Before the finishes, so that they free what no later step names at once.
        self._scheduler.completed(step_id)
        if ended.any():
            self._finish_rows(events, slots, ids, stopped, ended)
        events.slots = np.concatenate((events.slots, slots)) if len(events.slots) else slots
        events.ids = np.concatenate((events.ids, ids)) if len(events.ids) else ids

    def _make_room(self, step_id: int, built: BuiltStep, no_room: str, events: StepEvents) -> None:
        """Go on after a step that was not run. Those after it were not either: they name tokens that it never gave."""
        scheduler, unserved = self._scheduler, [built.slots]
        first = self._state.sequence(int(built.slots[0]))
        scheduler.completed(step_id)
        while self._in_flight:
            later, skipped = self._in_flight.popleft()
            if not self._executor.collect().no_room:
                raise EngineDead(f"step {later} was run although step {step_id} before it found no room: {no_room}")
            unserved.append(skipped.slots)
            scheduler.completed(later)
        events.collected = True
        self._no_room += 1
        self._resumes = True
        tokens = built.inputs.tokens
        scheduler.make_smaller(np.unique(np.concatenate(unserved)), tokens)
        if tokens > 1:
            logger.warning("the device has no room for a step of %d tokens, smaller ones follow: %s", tokens, no_room)
            return
        scheduler.restore()
        if not first.finished:
            advice = "leave more memory to steps by a lower memory_fraction or kv_cache_bytes"
            error = OutOfMemory(f"the device has no room for a single token of this request ({no_room}); {advice}")
            events.finished += self._finish_all(first.request, "error", error)

    def _note_first_tokens(self, slots: npt.NDArray[np.int64]) -> None:
        now = self._clock()
        for slot in slots.tolist():
            sequence = self._state.sequence(slot)
            sequence.first_token = now
            if sequence.choice == 0:
                for sibling in sequence.request.sequences[1:]:
                    if not sibling.finished:
                        self._scheduler.queue.push(sibling)

    def _report(
        self,
        events: StepEvents,
        result: StepResult,
        rows: npt.NDArray[np.int64] | None,
        slots: npt.NDArray[np.int64],
        ids: npt.NDArray[np.int64],
        watched: npt.NDArray[np.bool_],
    ) -> None:
        for place in np.flatnonzero(watched).tolist():
            sequence = self._state.sequence(int(slots[place]))
            row = place if rows is None else int(rows[place])
            event = token_event(sequence, int(ids[place]), result, row)
            if sequence.request.watched:
                events.tokens.append(event)

    # -- endings -------------------------------------------------------------------------------------------------------

    def _finish_rows(
        self,
        events: StepEvents,
        slots: npt.NDArray[np.int64],
        ids: npt.NDArray[np.int64],
        stopped: npt.NDArray[np.bool_],
        ended: npt.NDArray[np.bool_],
    ) -> None:
        for row in np.flatnonzero(ended).tolist():
            sequence = self._state.sequence(int(slots[row]))
            if not stopped[row]:
                events.finished.append(self._finish(sequence, "length", None))
                continue
            stop_reason = self._intake.stop_reason(sequence.request, int(ids[row]))
            events.finished.append(self._finish(sequence, "stop", stop_reason))

    def _finish_all(self, request: Request, reason: FinishReason, error: Exception | None = None) -> list[FinishEvent]:
        return [self._finish(sequence, reason, None, error) for sequence in request.sequences if not sequence.finished]

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        stop_reason: int | str | None,
        error: Exception | None = None,
    ) -> FinishEvent:
        request, slot = sequence.request, sequence.slot
        output = sequence.tokens[len(request.prompt) :] if slot < 0 else self._state.output(slot)
        event = finish_event(sequence, output, reason, stop_reason, error, self._clock())
        sequence.finished = True
        if sequence.queued:
            self._scheduler.queue.discard(sequence)
        if slot >= 0:
            self._scheduler.retire(slot)
        else:
            self._scheduler.close(request)
        if all(other.finished for other in request.sequences):
            del self._requests[request.id]
        return event

    def _die(self, error: Exception, events: StepEvents) -> None:
        if isinstance(error, EngineDead):
            self._error = error
        else:
            self._error = EngineDead(f"the engine failed: {type(error).__name__}: {error}")
            self._error.__cause__ = error
        for request in list(self._requests.values()):
            events.finished += self._finish_all(request, "error", self._error)
        for step_id, _ in self._in_flight:
            self._scheduler.completed(step_id)
        self._in_flight.clear()
