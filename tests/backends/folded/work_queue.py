"""The device's queue: calls in order, none of which runs before somebody waits for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from polyaccel.backend import DeviceLost, Event, OperatorError

Call = Callable[[], object]


class Queue:
    """Calls that wait for their turn. A call that raises loses the device: everything after it fails too.

    While a graph is recorded, calls go to its list instead.
    """

    def __init__(self) -> None:
        self._calls: deque[Call] = deque()
        self._recorded: list[Call] | None = None
        self._issued = 0
        self._done = 0
        self._running = False
        self._failure: Exception | None = None

    @property
    def recording(self) -> bool:
        return self._recorded is not None

    @property
    def issued(self) -> int:
        """Calls put so far: the ticket of an event recorded now."""
        return self._issued

    @property
    def done(self) -> int:
        """Calls that have run."""
        return self._done

    def put(self, call: Call) -> None:
        if self._recorded is not None:
            self._recorded.append(call)
            return
        self._calls.append(call)
        self._issued += 1

    def put_all(self, calls: Sequence[Call]) -> None:
        for call in calls:
            self.put(call)

    @contextmanager
    def record(self) -> Iterator[list[Call]]:
        """Collect the calls of the block in the yielded list; they do not run.

        Raises:
            OperatorError: another recording is in progress.
        """
        if self._recorded is not None:
            raise OperatorError("capture", "a graph is being captured already")
        calls: list[Call] = []
        self._recorded = calls
        try:
            yield calls
        finally:
            self._recorded = None

    def flush(self, ticket: int | None = None) -> None:
        """Run everything up to ``ticket`` (default: all). Inside a running call this does nothing: its turn has come.

        Raises:
            OperatorError: a graph is being recorded, in which nothing can be waited for.
            DeviceLost: an earlier call failed; its error is the cause.
        """
        if self._running:
            return
        if self._recorded is not None:
            raise OperatorError("capture", "the device is waited for while a graph is being captured")
        target = self._issued if ticket is None else ticket
        while self._done < target:
            self.step()
        self._raise_failure()

    def step(self) -> None:
        """Run one call, if there is one."""
        self._raise_failure()
        if not self._calls or self._running:
            return
        call = self._calls.popleft()
        self._running = True
        try:
            call()
        except Exception as error:
            self._failure = error
            self._calls.clear()
            raise
        finally:
            self._running = False
            self._done += 1

    def clear(self) -> None:
        """Drop what has not run."""
        self._done += len(self._calls)
        self._calls.clear()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise DeviceLost(f"an earlier call failed: {self._failure}") from self._failure


class QueueEvent(Event):
    """Everything put before it."""

    def __init__(self, queue: Queue) -> None:
        self._queue, self._ticket = queue, queue.issued

    def query(self) -> bool:
        """Whether it has run. The device makes progress by itself, one call for each question."""
        if self._queue.done < self._ticket:
            self._queue.step()
        return self._queue.done >= self._ticket

    def synchronize(self) -> None:
        self._queue.flush(self._ticket)
