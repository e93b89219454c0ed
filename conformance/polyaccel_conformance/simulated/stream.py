"""Streams in virtual time.

Every piece of work has a duration, and begins when its stream is free, its events have passed and the host has issued
it. Its effect happens at its end. The host's clock moves only where the host waits, so that nothing which is not
waited for has happened: the most hostile order that a real device is allowed.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from polyaccel_conformance.simulated.runtime import VirtualDevice

KERNEL_TIME = 1.0
"""Duration of a kernel or copy; the unit of virtual time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Work for a device: ``call`` is its effect; the rest is what an error and the device's activity say about it.

    ``kind``: ``kernel``, ``fill``, or a copy ``to device``, ``to host``, ``on device``, ``between devices``; ``delay``,
    ``mark``.
    """

    kernel: str
    call: Callable[[], object]
    kind: str = "kernel"
    operands: tuple[tuple[str, torch.Tensor], ...] = ()
    rank: int | None = None
    duration: float = KERNEL_TIME


@dataclass(slots=True, eq=False)
class Stream:
    """Work in order. ``end`` is when the last of it will be done."""

    device: VirtualDevice
    index: int
    end: float = 0.0


@dataclass(frozen=True, slots=True)
class Mark:
    """A recorded event: the time at which everything before it in its stream is done."""

    device: VirtualDevice
    time: float


@dataclass(order=True, slots=True)
class _Entry:
    end: float
    number: int
    stream: Stream = field(compare=False)
    task: Task = field(compare=False)


class Timeline:
    """All work of one machine that has not happened, by the time at which it will; ``now`` is the host's clock."""

    def __init__(self) -> None:
        self.now = 0.0
        self._waiting: list[_Entry] = []
        self._numbers = itertools.count()
        self._running = False

    def put(self, stream: Stream, task: Task) -> None:
        stream.end = max(stream.end, self.now) + task.duration
        heapq.heappush(self._waiting, _Entry(stream.end, next(self._numbers), stream, task))

    def advance(self, until: float, run: Callable[[Stream, Task], None]) -> None:
        """Everything that ends until then happens now. Does nothing inside of running work: its turn has come."""
        if self._running:
            return
        self._running = True
        try:
            while self._waiting and self._waiting[0].end <= until:
                entry = heapq.heappop(self._waiting)
                run(entry.stream, entry.task)
        finally:
            self._running = False
        self.now = max(self.now, until)

    def drop(self, device: VirtualDevice) -> None:
        """Work of a lost device never happens."""
        self._waiting = [entry for entry in self._waiting if entry.stream.device is not device]
        heapq.heapify(self._waiting)
