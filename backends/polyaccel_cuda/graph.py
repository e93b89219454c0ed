"""Captured decode steps. A graph is right for every step of its key: what differs between them is in device memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from polyaccel.backend import (
    Graph,
    GraphKey,
    Ledger,
    OperatorError,
    OutOfMemory,
    SampleOutput,
    Step,
    StepFunction,
)
from polyaccel.backend.composite.captured_sampling import CapturedSamplingState
from polyaccel_cuda.arena import Arena
from polyaccel_cuda.device import sound
from polyaccel_cuda.kernels.early import can_begin_early, early_launches
from polyaccel_cuda.step import CudaStep


@dataclass(slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    arena: Arena
    output: SampleOutput
    launches: Mapping[str, int]


class CudaGraph(Graph):
    """One or more captures of a key: one for each kind of sampling that its steps asked for.

    Captures are made when a step first needs them. Adapters never cause one. Collectives may be among what is captured:
    all ranks run the same steps in the same order, and so capture alike.

    Args:
        replayed: told after each replay, whose collectives nobody else sees being issued.
        check: raises if collectives were given up, of which a capture learns by errors that say less.
    """

    def __init__(
        self,
        key: GraphKey,
        fn: StepFunction,
        ledger: Ledger,
        pool: Any,
        replayed: Callable[[], None] | None = None,
        check: Callable[[], None] = sound,
    ) -> None:
        self.key = key
        self._fn, self._ledger, self._pool = fn, ledger, pool
        self._replayed, self._check = replayed, check
        self._captured: dict[object, _Captured] = {}

    @property
    def holds_memory(self) -> bool:
        """Whether it has a capture, whose memory pool is then in use."""
        return bool(self._captured)

    def capture(self, step: CudaStep) -> None:
        """Add the capture that ``step`` needs, unless there is one."""
        state, needs = CapturedSamplingState.of(step)
        found = self._captured.get(needs)
        if found is not None and found.arena is step.arena:
            return
        store = step.store()
        rank_rows = step.rank_rows
        if step.input.tokens != self.key.rows or rank_rows > self.key.rank_rows:
            raise OperatorError(
                "capture", f"a step of {step.input.tokens} rows and {rank_rows} rank rows for {self.key}"
            )
        step.rank_rows = min(self.key.rank_rows, 0 if store is None else store.rank_rows)
        step.captured = True
        device = step.tensor("positions").device
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        with state.rehearsal(), torch.cuda.device(device), early_launches(can_begin_early(device)):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream), self._ledger.capture():
                # Kernels are compiled and libraries set up outside the capture.
                self._fn(step)
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            # Other threads may use the device meanwhile: the collective library's own looks at what is under way.
            capturing = torch.cuda.graph(graph, self._pool, stream, capture_error_mode="thread_local")
            try:
                with self._ledger.capture() as launches, capturing:
                    output = self._fn(step)
            except torch.AcceleratorError as error:
                # The driver's own memory for a graph, which no allocator of torch has asked for.
                self._check()
                if "out of memory" not in str(error):
                    raise
                raise OutOfMemory(f"no room to capture a step of {self.key.rows} rows: {error}") from error
            torch.cuda.current_stream().wait_stream(stream)
        self._captured[needs] = _Captured(graph, step.arena, output, dict(launches))

    def replay(self, step: Step) -> SampleOutput:
        own = CudaStep.of("replay", step)
        if own.input.tokens != self.key.rows:
            raise OperatorError("replay", f"a step of {own.input.tokens} rows for {self.key}")
        self.capture(own)
        state, needs = CapturedSamplingState.of(own)
        captured = self._captured[needs]
        self._ledger.add(captured.launches)
        with torch.cuda.device(own.tensor("positions").device):
            captured.graph.replay()
        if self._replayed is not None:
            self._replayed()
        state.count_outputs(own.input.sample_slots)
        return captured.output

    def close(self) -> None:
        for captured in self._captured.values():
            captured.graph.reset()
        self._captured.clear()
