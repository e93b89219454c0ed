"""Captured decode steps (torch.npu.NPUGraph). A graph is right for every step of its key.

What differs between steps is in device memory, but for the lengths that FIA takes as host numbers: its calls are task
groups, which get new numbers before a replay (aclmdlRICaptureTaskUpdateBegin; torch_npu's own update of a graph does
the same). Composites of a capture see the longest contexts that the block tables can hold.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from polyaccel.backend import (
    Graph,
    GraphKey,
    OperatorError,
    Reason,
    SampleOutput,
    Step,
    StepFunction,
    StepInput,
)
from polyaccel.backend.composite.captured_sampling import CapturedSamplingState
from polyaccel.backend.ledger import COMPOSITE_PREFIX, NESTED_PREFIX
from polyaccel_npu import runtime
from polyaccel_npu.arena import Arena
from polyaccel_npu.chip import Chip
from polyaccel_npu.issue import Issuer
from polyaccel_npu.step import GraphMode, NpuStep

FAMILIES = ("A2", "A3", "950")
"""Chips with aclmdlRICapture*: Atlas A2, A3 and their successors, no inference cards (torch_npu's documents of
torch.npu.NPUGraph)."""
NEEDED = ("NPUGraph", "graph", "graph_task_group_begin", "graph_task_update_begin")
EAGER = "npu.eager_decode"
"""Counted for each step that a graph could not hold and that ran call by call."""
HOST_SEGMENTS = ("sgmv", "sgmv_shrink", "sgmv_expand", "embedding", "moe_experts")
"""Composites whose calls follow the step's segments, which the host knows: with adapters no graph can hold them, and
such steps run call by call."""


def refusals(chip: Chip) -> list[Reason]:
    """Why this process captures no graphs."""
    reasons = []
    if chip.family not in FAMILIES:
        reasons.append(f"chip {chip.family} captures no graphs; {', '.join(FAMILIES)} do")
    missing = [name for name in NEEDED if not hasattr(runtime.npu(), name)]
    if missing:
        reasons.append(f"this torch_npu has no torch.npu.{missing[0]}")
    if os.environ.get("TASK_QUEUE_ENABLE") == "2":
        reasons.append("torch_npu refuses a capture under TASK_QUEUE_ENABLE=2 (ERR00007); 0 and 1 are fine")
    if os.environ.get("ASCEND_LAUNCH_BLOCKING") == "1":
        reasons.append("ASCEND_LAUNCH_BLOCKING=1 waits after each call, which a captured stream cannot")
    return reasons


class HostCalls:
    """The calls of one capture that take numbers of the host.

    Args:
        lengths: what they take at first.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = tuple(lengths)
        self.recording = False
        self._tasks: list[tuple[Any, Callable[[list[int]], object]]] = []
        self._side: Any = None

    def call(self, fn: Callable[[list[int]], object]) -> object:
        """``fn(lengths)`` now, and once more whenever the lengths change, if it is being recorded."""
        if not self.recording:
            return fn(list(self.lengths))
        npu = runtime.npu()
        stream = npu.current_stream()
        npu.graph_task_group_begin(stream)
        try:
            return fn(list(self.lengths))
        finally:
            self._tasks.append((npu.graph_task_group_end(stream), fn))

    def update(self, lengths: Sequence[int], issuer: Issuer) -> None:
        """Let the next replays take other lengths. Ordered after the replays before, without waiting for them.

        Raises:
            OperatorError: CANN refuses them.
        """
        if tuple(lengths) == self.lengths or not self._tasks:
            return
        issuer.health.check()
        npu = runtime.npu()
        self._side = self._side or npu.Stream()
        current = npu.current_stream()
        self._side.wait_stream(current)
        try:
            with npu.stream(self._side):
                for handle, fn in self._tasks:
                    npu.graph_task_update_begin(self._side, handle)
                    fn(list(lengths))
                    npu.graph_task_update_end(self._side)
        except RuntimeError as error:
            raise issuer.explained("fused_infer_attention_score", {}, error) from error
        current.wait_stream(self._side)
        self.lengths = tuple(lengths)


@dataclass(slots=True)
class _Captured:
    graph: Any
    arena: Arena
    host: HostCalls
    output: SampleOutput
    launches: Mapping[str, int]


class NpuGraph(Graph):
    """One or more captures of a key: one for each kind of sampling that its steps asked for. The rare step whose calls
    would be others runs eagerly, counted as ``npu.eager_decode``; so do all steps of a key with adapters on a composite
    whose calls follow the segments.

    Captures are made when a step first needs them, and again when the block tables outgrow their place. Adapters never
    cause one. Collectives may be among what is captured: all ranks run the same steps in the same order.
    """

    def __init__(self, key: GraphKey, fn: StepFunction, issuer: Issuer, pool: Any) -> None:
        self.key = key
        self._fn, self._issuer, self._pool = fn, issuer, pool
        self._captured: dict[object, _Captured] = {}
        self._follows_segments = False

    @property
    def holds_memory(self) -> bool:
        """Whether it has a capture, whose memory pool is then in use."""
        return bool(self._captured)

    def capture(self, step: NpuStep) -> None:
        """Add the capture that ``step`` needs, unless there is one.

        Raises:
            OperatorError: a step of another key; or something in it cannot be captured.
        """
        state, needs = CapturedSamplingState.of(step)
        found = self._captured.get(needs)
        if found is not None and found.arena is step.arena:
            return
        self._check(step)
        if self._follows_segments or _irregular(step):
            return
        npu, ledger = runtime.npu(), self._issuer.launcher.ledger
        host = HostCalls(_lengths(step.input))
        with npu.device(step.torch_device), state.rehearsal(), _mode(step, GraphMode(self.key.rank_rows, host)):
            stream = npu.Stream()
            stream.wait_stream(npu.current_stream())
            with npu.stream(stream), ledger.capture() as rehearsed:
                # Communicators, masks and workspaces are made outside the capture.
                self._fn(step)
            stream.synchronize()
            self._follows_segments = self._has_host_segments(rehearsed)
            if self._follows_segments:
                npu.current_stream().wait_stream(stream)
                return
            step.forget()
            graph, host.recording = npu.NPUGraph(), True
            # Other threads may use the device meanwhile: HCCL's own looks at what is under way.
            capturing = npu.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local")
            try:
                with ledger.capture() as launches, capturing:
                    output = self._fn(step)
            except RuntimeError as error:
                raise self._issuer.explained("capture", {}, error) from error
            host.recording = False
            npu.current_stream().wait_stream(stream)
        self._captured[needs] = _Captured(graph, step.arena, host, output, dict(launches))

    def replay(self, step: Step) -> SampleOutput:
        own = NpuStep.of("replay", step)
        self._check(own)
        self._issuer.health.check()
        if not _irregular(own):
            self.capture(own)
        if self._follows_segments or _irregular(own):
            self._issuer.launcher.ledger.record(EAGER)
            return self._fn(own)
        state, needs = CapturedSamplingState.of(own)
        captured = self._captured[needs]
        with runtime.npu().device(own.torch_device):
            captured.host.update(_lengths(own.input), self._issuer)
            self._issuer.launcher.ledger.add(captured.launches)
            try:
                captured.graph.replay()
            except RuntimeError as error:
                raise self._issuer.explained("replay", {}, error) from error
        state.count_outputs(own.input.sample_slots)
        return captured.output

    def close(self) -> None:
        for captured in self._captured.values():
            captured.graph.reset()
        self._captured.clear()

    def _check(self, step: NpuStep) -> None:
        inputs, last = step.input, step.last_rank_row
        if inputs.tokens != self.key.rows or inputs.sequences != inputs.tokens:
            reason = f"a step of {inputs.tokens} rows and {inputs.sequences} sequences for {self.key}"
            raise OperatorError("graph", reason)
        if last > self.key.rank_rows:
            raise OperatorError("graph", f"a step whose adapters end at rank row {last} for {self.key}")

    def _has_host_segments(self, launches: Mapping[str, int]) -> bool:
        names = {name.removeprefix(NESTED_PREFIX).removeprefix(COMPOSITE_PREFIX) for name in launches}
        return bool(self.key.rank_rows) and not names.isdisjoint(HOST_SEGMENTS)


@contextmanager
def _mode(step: NpuStep, mode: GraphMode) -> Iterator[None]:
    """The step as a graph's, whatever step it is: its contexts, where the host looks, are the longest there can be."""
    inputs, step.graph = step.input, mode
    longest = np.zeros_like(inputs.context_lengths)
    longest[:1] = step.capacity
    step.input = replace(inputs, context_lengths=longest)
    step.forget()
    try:
        yield
    finally:
        step.input, step.graph = inputs, None
        step.forget()


def _irregular(step: NpuStep) -> bool:
    """Whether the step's calls are not those of the graph: rows to be left out of the cache beyond its spare slots, or
    more blocks, counted by sequence, than one call of FIA takes."""
    if step.arena.lengths["stored"] != step.input.tokens:
        return True
    return step.key_room is not None and not step.key_room.takes(_lengths(step.input))


def _lengths(inputs: StepInput) -> list[int]:
    """Keys of each sequence, one where there are none: rows that pad a step read one, which means nothing."""
    return np.maximum(inputs.context_lengths, 1).tolist()  # type: ignore[no-any-return]


def capture(key: GraphKey, fn: StepFunction, step: Step, issuer: Issuer, pool: Any) -> NpuGraph:
    """A graph with its first capture, which ``step`` is an example for."""
    graph = NpuGraph(key, fn, issuer, pool)
    graph.capture(NpuStep.of("capture", step))
    return graph


def new_pool(device: torch.device) -> Any:
    """Where the graphs of a device keep what they make."""
    npu = runtime.npu()
    with npu.device(device):
        return npu.graph_pool_handle()
