"""The engine's thread: it alone touches the core and the executor; everybody else sends it work.

Callers get their events through a sink of their own, so that a slow reader delays nobody.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from polyaccel.backend.errors import EngineDead
from polyaccel.engine.adapter_manager import AdapterManager
from polyaccel.engine.core import CoreStats, EngineCore
from polyaccel.engine.events import FinishEvent, StepEvents, TokenEvent
from polyaccel.engine.outputs import Timing
from polyaccel.engine.sampling_params import SamplingParams
from polyaccel.lora.mix import AdapterMix

logger = logging.getLogger("polyaccel.engine")

R = TypeVar("R")
Event = TokenEvent | FinishEvent
Sink = Callable[[Event], None]

IDLE_SECONDS = 0.002


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRequest:
    """A validated request on its way to the core. ``watched``: the sink wants every token, not only the end."""

    request_id: str
    prompt: list[int]
    params: SamplingParams
    mix: AdapterMix
    watched: bool
    sink: Sink
    priority: int = 0


class EngineLoop:
    """Owns the core, the adapter manager and the thread that drives them."""

    def __init__(self, core: EngineCore, adapters: AdapterManager) -> None:
        self._core, self._adapters = core, adapters
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._sinks: dict[str, tuple[Sink, int, AdapterMix]] = {}
        self._paused = 0
        self._held: list[Callable[[], None]] = []
        # Reentrant: a stream that is collected as garbage aborts its request from wherever the collector runs.
        self._gate = threading.RLock()
        self._closing = False
        self._dead: EngineDead | None = None
        self._thread = threading.Thread(target=self._run, name="polyaccel-engine", daemon=True)
        self._thread.start()

    # -- from any thread -----------------------------------------------------------------------------------------------

    def submit(self, requests: Sequence[NewRequest]) -> None:
        """Queue requests, all or none of them.

        Raises:
            RequestRejected, RequestTooLong, AdapterNotFound: one of them cannot run; none was queued.
            EngineDead: the engine has failed or is closed.
        """
        self._call(lambda: self._add(requests), waits_for_resume=True)

    def abort(self, request_id: str) -> None:
        """End a request; its remaining choices finish with reason ``abort``. Unknown or finished ids are ignored, and
        so is everything once the engine is closed."""
        with contextlib.suppress(EngineDead):
            self._post(lambda: self._deliver_finishes(self._core.abort(request_id)))

    def stop_choice(self, request_id: str, choice: int, stop_reason: str) -> None:
        """The caller has matched a stop string: end this choice. Ignored as in :meth:`abort`."""
        with contextlib.suppress(EngineDead):
            self._post(lambda: self._deliver_finish(self._core.finish(request_id, choice, stop_reason)))

    def call(self, function: Callable[[], R]) -> R:
        """Run a function on the engine's thread between two steps and return its result, or raise its error."""
        return self._call(function, waits_for_resume=False)

    def call_when_drained(self, function: Callable[[], R]) -> R:
        """Run a function once every request submitted so far has ended; later ones start after it has returned."""
        self.call(self._pause)
        try:
            while not self.call(lambda: not self._core.has_work):
                threading.Event().wait(IDLE_SECONDS)
            return self.call(function)
        finally:
            self.call(self._resume)

    def stats(self) -> CoreStats:
        return self.call(self._core.stats)

    def close(self) -> None:
        """Abort what is left and stop the thread. Idempotent."""
        with self._gate:
            if not self._closing:
                self._closing = True
                self._commands.put(None)
        self._thread.join()

    @property
    def dead(self) -> EngineDead | None:
        """Why the engine cannot go on, if so."""
        return self._dead

    # -- on the engine's thread ----------------------------------------------------------------------------------------

    def _call(self, function: Callable[[], R], *, waits_for_resume: bool) -> R:
        future: Future[R] = Future()

        def run() -> None:
            if waits_for_resume and self._paused and self._dead is None:
                self._held.append(run)
                return
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self._post(run)
        return future.result()

    def _post(self, command: Callable[[], None]) -> None:
        with self._gate:
            if self._closing:
                raise self._dead or EngineDead("the engine is closed")
            self._commands.put(command)

    def _add(self, requests: Sequence[NewRequest]) -> None:
        if self._dead is not None:
            raise self._dead
        added: list[NewRequest] = []
        try:
            for request in requests:
                self._adapters.validate(request.mix)
                self._core.add_request(
                    request.request_id,
                    request.prompt,
                    request.params,
                    request.mix,
                    priority=request.priority,
                    watched=request.watched,
                )
                added.append(request)
        except BaseException:
            for request in added:
                self._core.abort(request.request_id)
            raise
        for request in requests:
            self._sinks[request.request_id] = (request.sink, request.params.n, request.mix)
            self._adapters.expect(request.mix, 1)

    def _pause(self) -> None:
        self._paused += 1

    def _resume(self) -> None:
        self._paused -= 1
        if self._paused == 0:
            self._release_held()

    def _run(self) -> None:
        try:
            while self._handle_commands(wait=not self._core.has_work):
                events = self._core.step()
                self._deliver(events)
                if self._core.error is not None and self._dead is None:
                    self._dead = self._core.error
                    logger.error("the engine stopped: %s", str(self._dead).partition("\n")[0])
                if events.idle and self._core.has_work:
                    # Everything waits for an adapter to be read.
                    threading.Event().wait(IDLE_SECONDS)
        except Exception as error:
            logger.exception("the engine's thread failed")
            self._dead = EngineDead(f"the engine failed: {type(error).__name__}: {error}")
            self._dead.__cause__ = error
        self._end()

    def _handle_commands(self, *, wait: bool) -> bool:
        """Run what has been sent; False when the loop should end."""
        while True:
            try:
                command = self._commands.get(block=wait)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            wait = False

    def _deliver(self, events: StepEvents) -> None:
        for token in events.tokens:
            entry = self._sinks.get(token.request_id)
            if entry is not None:
                _hand_over(entry[0], token)
        self._deliver_finishes(events.finished)

    def _deliver_finishes(self, finishes: Sequence[FinishEvent]) -> None:
        for finish in finishes:
            self._deliver_finish(finish)

    def _deliver_finish(self, finish: FinishEvent | None) -> None:
        if finish is None:
            return
        sink, open_choices, mix = self._sinks[finish.request_id]
        if open_choices == 1:
            del self._sinks[finish.request_id]
            self._adapters.expect(mix, -1)
        else:
            self._sinks[finish.request_id] = (sink, open_choices - 1, mix)
        _hand_over(sink, finish)

    def _end(self) -> None:
        """Leave nobody waiting: every request gets its end, every call an answer."""
        with self._gate:
            self._closing = True
        if self._dead is None:
            self._dead = EngineDead("the engine is closed")
            for request_id in list(self._sinks):
                self._deliver_finishes(self._core.abort(request_id))
        for request_id, (sink, _, mix) in self._sinks.items():
            _hand_over(sink, _failed(request_id, mix, self._dead))
        self._sinks.clear()
        self._release_held()
        while True:
            try:
                command = self._commands.get(block=False)
            except queue.Empty:
                return
            if command is not None:
                command()

    def _release_held(self) -> None:
        held, self._held = self._held, []
        for command in held:
            command()


def _hand_over(sink: Sink, event: Event) -> None:
    # A receiver that is gone, such as a closed event loop, is no other request's problem.
    try:
        sink(event)
    except Exception:
        logger.exception("an event of %s could not be handed over", event.request_id)


def _failed(request_id: str, mix: AdapterMix, error: EngineDead | None) -> FinishEvent:
    """The end of a request that the core can give none to."""
    return FinishEvent(
        request_id=request_id,
        choice=0,
        reason="error",
        stop_reason=None,
        token_ids=np.zeros(0, dtype=np.int64),
        logprobs=None,
        prompt_tokens=0,
        cached_tokens=0,
        adapter=mix,
        timing=Timing(queue=0.0, prefill=0.0, first_token=0.0, decode=0.0),
        error=error,
    )
