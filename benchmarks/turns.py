"""Times on a GPU, of forms of the same work that take turns: what drifts, such as the clock, is then no difference.

Without a GPU everything runs too, interpreted and kernel by kernel, so that a benchmark can be tried before it is
measured; its times then mean nothing.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from cuda_model import Model, Stations

from polyaccel.backend import GraphKey, SampleOutput, Step
from polyaccel.engine.graphs import rank_bucket

WARM = 3
AHEAD = 40_000_000
"""Cycles for which the device waits while launches are queued: some 20 ms."""
Key = TypeVar("Key")


def present() -> bool:
    return torch.cuda.is_available()


def device_name() -> str:
    return torch.cuda.get_device_name() if present() else "interpreted"


def timed(fn: Callable[[], object]) -> float:
    """Milliseconds."""
    if not present():
        begun = time.perf_counter()
        fn()
        return (time.perf_counter() - begun) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    fn()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def bandwidth() -> float:
    """Bytes a second that one sum over 2 GiB reads."""
    x = torch.ones(1 << 29, device="cuda") if present() else torch.ones(1 << 20)
    times = [timed(lambda: x.sum()) for _ in range(7)]
    return x.numel() * 4 / statistics.median(times) * 1e3


def in_turns(
    forms: Mapping[Key, Callable[[], Callable[[], object]]], repeats: int, *, queued: bool = False
) -> dict[Key, float]:
    """Median milliseconds of each form. A form first prepares, untimed, and returns what is timed.

    Args:
        queued: what is timed is launched kernel by kernel, and what the host takes for that shall not count.
    """
    times: dict[Key, list[float]] = {name: [] for name in forms}
    warm = WARM if present() else 0
    for turn in range(warm + repeats):
        for name, prepare in forms.items():
            run = prepare()
            if present():
                torch.cuda.synchronize()
                if queued:
                    torch.cuda._sleep(AHEAD)
            took = timed(run)
            if turn >= warm:
                times[name].append(took)
    return {name: statistics.median(found) for name, found in times.items()}


class Decode:
    """A model's decode step in a graph of its own; one of :func:`in_turns`'s forms.

    Args:
        slots: adapters named by the step, row after row in turn.
        stations: what runs in place of the model's own; ``slots`` are then theirs to know, not the step's.
    """

    def __init__(
        self, model: Model, rows: int, slots: Sequence[int] | None = None, stations: Stations | None = None
    ) -> None:
        self._model, self._rows, self._slots = model, rows, list(slots) if slots else None
        self._run = model if stations is None else functools.partial(model, stations=stations)
        rank_rows = model.store.graph_rank_rows(set(self._slots or ()), rows)
        key = GraphKey(rows=rows, rank_rows=rank_bucket(rank_rows))
        self._graph = model.backend.capture(key, self._run, self._step()) if present() else None

    def __call__(self) -> Callable[[], SampleOutput]:
        return functools.partial(self._run if self._graph is None else self._graph.replay, self._step())

    def agreement(self) -> float:
        """Share of the tokens that are the same when the step is run kernel by kernel."""
        eager = self._run(self._step()).ids.clone()
        return float((self()().ids == eager).float().mean())

    def close(self) -> None:
        if self._graph is not None:
            self._graph.close()

    def _step(self) -> Step:
        return self._model.step(self._rows, self._slots)
