"""Decode graphs: captured lazily per row count and rank-row bucket, replayed for every later step that fits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from polyaccel.backend.backend import Backend
from polyaccel.backend.device import Device
from polyaccel.backend.graph import Graph, GraphKey, StepFunction
from polyaccel.backend.sampling import SampleOutput
from polyaccel.backend.step import DeviceState, StepInput, TokenClass


def row_buckets(max_rows: int) -> tuple[int, ...]:
    """Row counts that graphs are captured for: 1, 2, 4, then every 8 (every 16 from 32 on) up to ``max_rows``."""
    sizes = [1, 2, 4, *range(8, 32, 8), *range(32, max_rows + 16, 16)]
    return (
        tuple(size for size in sizes if size <= max_rows)
        if max_rows in sizes
        else (*(s for s in sizes if s < max_rows), max_rows)
    )


def rank_bucket(rank_rows: int) -> int:
    """Rank rows a graph covers: 0, or the next power of two from 8."""
    return 0 if rank_rows == 0 else max(8, 1 << (rank_rows - 1).bit_length())


def pad_decode(inputs: StepInput, rows: int, spare_request_slot: int) -> StepInput:
    """The same decode step with padding rows: token 0 at position 0, nothing stored, sampled into a spare slot."""
    missing = rows - inputs.tokens
    if missing == 0:
        return inputs
    zeros = np.zeros(missing, dtype=np.int64)

    def extended(array: np.ndarray, value: int = 0) -> np.ndarray:
        return np.concatenate((array, np.full((missing, *array.shape[1:]), value, dtype=array.dtype)))

    last = int(inputs.query_starts[-1])
    return replace(
        inputs,
        token_ids=np.concatenate((inputs.token_ids, zeros)),
        positions=np.concatenate((inputs.positions, zeros)),
        query_starts=np.concatenate(
            (inputs.query_starts, np.arange(last + 1, rows + 1, dtype=inputs.query_starts.dtype))
        ),
        context_lengths=extended(inputs.context_lengths),
        block_tables=extended(inputs.block_tables),
        kv_slots=extended(inputs.kv_slots, -1),
        request_slots=extended(inputs.request_slots, spare_request_slot),
        logits_rows=np.arange(rows, dtype=inputs.logits_rows.dtype),
        sample_slots=extended(inputs.sample_slots, spare_request_slot),
        uniforms=extended(inputs.uniforms),
    )


class GraphCache:
    """The captured decode graphs of one worker. A failed capture is an error, never a silent eager run."""

    def __init__(
        self, backend: Backend, device: Device, state: DeviceState, fn: StepFunction, *, max_rows: int
    ) -> None:
        self._backend, self._device, self._state, self._fn = backend, device, state, fn
        self._buckets = row_buckets(max_rows)
        self._graphs: dict[GraphKey, Graph] = {}
        self.captures = 0
        self.replays = 0

    def accepts(self, inputs: StepInput) -> bool:
        return inputs.token_class is TokenClass.DECODE and inputs.tokens <= self._buckets[-1]

    def run(self, inputs: StepInput, rank_rows: int, spare_request_slot: int) -> SampleOutput:
        """Replay the graph that covers this step, capturing it first if need be.

        Returns the first ``inputs.tokens`` rows; they are valid until the next replay.
        """
        rows = next(size for size in self._buckets if size >= inputs.tokens)
        key = GraphKey(rows=rows, rank_rows=rank_bucket(rank_rows))
        step = self._backend.begin_step(pad_decode(inputs, rows, spare_request_slot), self._state, self._device)
        graph = self._graphs.get(key)
        if graph is None:
            graph = self._graphs[key] = self._backend.capture(key, self._fn, step)
            self.captures += 1
        self.replays += 1
        return _first_rows(graph.replay(step), inputs.tokens)

    def clear(self) -> None:
        """Drop every graph: after the plan changed, and before the communicator is closed."""
        for graph in self._graphs.values():
            graph.close()
        self._graphs.clear()


def _first_rows(output: SampleOutput, rows: int) -> SampleOutput:
    if output.ids.shape[0] == rows:
        return output
    return SampleOutput(
        ids=output.ids[:rows],
        logprobs=None if output.logprobs is None else output.logprobs[:rows],
        top_ids=None if output.top_ids is None else output.top_ids[:rows],
        top_logprobs=None if output.top_logprobs is None else output.top_logprobs[:rows],
    )
