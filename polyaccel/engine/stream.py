"""One request's deltas, as an iterator for synchronous callers."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from polyaccel.engine.assembler import ChoiceAssembler
from polyaccel.engine.engine import Engine
from polyaccel.engine.events import FinishEvent
from polyaccel.engine.loop import Event, NewRequest
from polyaccel.engine.outputs import Delta


class DeltaStream(Iterator[Delta]):
    """The deltas of a request that has been queued, as they come; the last one of each choice has its completion.

    Closing the stream, leaving it as a context manager or dropping it aborts what is left of the request.
    """

    def __init__(self, engine: Engine, request: NewRequest, events: queue.SimpleQueue[Event]) -> None:
        self._engine, self._request, self._events = engine, request, events
        self._assemblers = [engine.assembler(request, choice) for choice in range(request.params.n)]
        self._remaining = len(self._assemblers)

    def __next__(self) -> Delta:
        """Wait for the next delta. Raises StopIteration after the last, EngineDead or what failed the request."""
        while self._remaining:
            event = self._events.get()
            try:
                delta = next_delta(self._engine, self._assemblers[event.choice], event)
            except BaseException:
                self.close()
                raise
            if delta is None:
                continue
            if delta.completion is not None:
                self._remaining -= 1
            return delta
        raise StopIteration

    def close(self) -> None:
        """Abort the request unless it has ended. Idempotent."""
        if self._remaining:
            self._remaining = 0
            self._engine.loop.abort(self._request.request_id)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_remaining"):
            self.close()


def next_delta(engine: Engine, assembler: ChoiceAssembler, event: Event) -> Delta | None:
    """What an event adds to a stream: None once a stop string has matched and the end is awaited."""
    if isinstance(event, FinishEvent):
        raise_if_failed(event)
        text, completion = assembler.finish(event)
        return Delta(text=text, token_ids=(), index=event.choice, completion=completion)
    return advance(engine, assembler, event)


def advance(engine: Engine, assembler: ChoiceAssembler, event: Event) -> Delta | None:
    """Push a token; the first match of a stop string ends the choice in the engine."""
    assert not isinstance(event, FinishEvent)
    before = assembler.matched
    delta = assembler.push(event)
    if before is None and assembler.matched is not None:
        engine.loop.stop_choice(event.request_id, event.choice, assembler.matched)
    return delta


def raise_if_failed(event: FinishEvent) -> None:
    if event.error is not None:
        raise event.error
