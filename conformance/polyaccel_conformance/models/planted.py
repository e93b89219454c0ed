"""Bugs planted in the engine: the controls of the whole-model checks, and the engine's mutants.

Each is a context manager that patches one method for the engines built and run inside it, in this process.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from types import MappingProxyType
from unittest import mock

import numpy as np
import numpy.typing as npt

from polyaccel.backend import AdapterRows, RowSet, SampleOutput, StepInput, TokenClass
from polyaccel.engine.adapter_manager import AdapterManager
from polyaccel.engine.batch_state import BatchState
from polyaccel.engine.graphs import GraphCache
from polyaccel.engine.scheduler import Plan, Scheduler
from polyaccel.engine.step_builder import BuiltStep, StepBuilder
from polyaccel.lora.mix import AdapterMix
from polyaccel.lora.numbers import RankNumbers

Edit = Callable[[StepBuilder, BatchState, StepInput], StepInput]


@contextmanager
def _steps(edit: Edit) -> Iterator[None]:
    """Every step that the engine builds passes through ``edit``."""
    build = StepBuilder.build

    def wrong(self: StepBuilder, plan: Plan) -> BuiltStep:
        built = build(self, plan)
        return replace(built, inputs=edit(self, self._state, built.inputs))

    with mock.patch.object(StepBuilder, "build", wrong):
        yield


def _restart_positions(_: StepBuilder, __: BatchState, inputs: StepInput) -> StepInput:
    """The positions of a chunk count from its own beginning."""
    return _restarted(inputs, np.ones(inputs.sequences, dtype=np.bool_))


def _restart_middle(_: StepBuilder, __: BatchState, inputs: StepInput) -> StepInput:
    """The same, only of chunks that are neither the first nor the last of their prompt."""
    last = np.isin(inputs.query_starts[1:] - 1, inputs.logits_rows)
    return _restarted(inputs, ~last)


def _restarted(inputs: StepInput, which: npt.NDArray[np.bool_]) -> StepInput:
    positions = inputs.positions.copy()
    for begin, end in zip(inputs.query_starts[:-1][which], inputs.query_starts[1:][which], strict=True):
        if end - begin > 1:
            positions[begin:end] = np.arange(end - begin)
    return replace(inputs, positions=positions)


def _base_position(_: StepBuilder, state: BatchState, inputs: StepInput) -> StepInput:
    """Where no request has an adapter, the last of several decoding sequences is one position ahead."""
    if inputs.token_class is not TokenClass.DECODE or inputs.sequences < 2 or state.mix_sizes.any():
        return inputs
    positions = inputs.positions.copy()
    positions[-1] += 1
    return replace(inputs, positions=positions)


def _uniform_by_row(_: StepBuilder, __: BatchState, inputs: StepInput) -> StepInput:
    """Random numbers follow the row, not the request."""
    return replace(inputs, uniforms=np.roll(inputs.uniforms, 1))


def _known_source(_: StepBuilder, state: BatchState, inputs: StepInput) -> StepInput:
    """A token that is still being sampled is replaced by the last one that the host knows."""
    ids = inputs.token_ids.copy()
    for row in np.flatnonzero(ids < 0):
        slot = -1 - int(ids[row])
        ids[row] = state.tokens[slot, state.known[slot] - 1]
    return replace(inputs, token_ids=ids)


def _without_last_key(_: StepBuilder, __: BatchState, inputs: StepInput) -> StepInput:
    """The last of several sequences does not see its own newest token."""
    lengths = inputs.context_lengths.copy()
    if len(lengths) > 1 and lengths[-1] > 1:
        lengths[-1] -= 1
    return replace(inputs, context_lengths=lengths)


def _next_slot(_: StepBuilder, __: BatchState, inputs: StepInput) -> StepInput:
    """Where several adapters meet in a step, the first segment uses the second one's."""

    def shifted(rows: AdapterRows) -> AdapterRows:
        if len(rows.segment_slots) < 2:
            return rows
        slots = np.where(rows.slots == rows.segment_slots[0], rows.segment_slots[1], rows.slots)
        return AdapterRows.build(rows.rows, slots.astype(np.int32), rows.weights)

    return replace(inputs, adapters={name: shifted(rows) for name, rows in inputs.adapters.items()})


def _whole_weights(_: StepBuilder, __: BatchState, inputs: StepInput) -> StepInput:
    """The weights of a mix are ignored."""
    return replace(
        inputs,
        adapters={
            name: AdapterRows.build(rows.rows, rows.slots, np.ones_like(rows.weights))
            for name, rows in inputs.adapters.items()
        },
    )


def _first_row(_: StepBuilder, __: BatchState, inputs: StepInput) -> StepInput:
    """Without adapters a prompt's next token comes from its first row."""
    if inputs.has_adapters or len(inputs.logits_rows) != inputs.sequences:
        return inputs
    return replace(inputs, logits_rows=inputs.query_starts[:-1].astype(inputs.logits_rows.dtype))


@contextmanager
def _cache_key(key: Callable[[AdapterManager, AdapterMix], Hashable]) -> Iterator[None]:
    with mock.patch.object(AdapterManager, "cache_key", key):
        yield


@contextmanager
def _preempted_token_lost() -> Iterator[None]:
    preempt = Scheduler._preempt_youngest

    def wrong(self: Scheduler) -> None:
        preempt(self)
        sequence = self.queue.peek()
        if sequence is not None and len(sequence.tokens) > len(sequence.request.prompt):
            sequence.tokens[-1] = 0

    with mock.patch.object(Scheduler, "_preempt_youngest", wrong):
        yield


@contextmanager
def _freed_early() -> Iterator[None]:
    """A finished sequence's slot and blocks are free although a submitted step still names them."""

    def wrong(self: Scheduler, slot: int) -> None:
        self._leave(slot)
        self._state.live[slot] = False
        self._vacate(slot)

    with mock.patch.object(Scheduler, "retire", wrong):
        yield


@contextmanager
def _graph_keeps_adapters() -> Iterator[None]:
    """A graph goes on with the adapters that it was captured with."""
    run = GraphCache.run
    first: dict[tuple[int, int], dict[RowSet, AdapterRows]] = {}

    def wrong(self: GraphCache, inputs: StepInput, rank_rows: int, spare_request_slot: int) -> SampleOutput:
        if inputs.has_adapters:
            kept = first.setdefault((id(self), inputs.tokens), dict(inputs.adapters))
            inputs = replace(inputs, adapters=kept)
        return run(self, inputs, rank_rows, spare_request_slot)

    with mock.patch.object(GraphCache, "run", wrong):
        yield


@contextmanager
def _scaled_by_padded_rank() -> Iterator[None]:
    """The founding case: alpha over a rank padded to 16."""
    of = RankNumbers.of.__func__  # type: ignore[attr-defined]

    def wrong(cls: type[RankNumbers], *, alpha: float, true_rank: int, use_rslora: bool = False) -> RankNumbers:
        numbers: RankNumbers = of(cls, alpha=alpha, true_rank=true_rank, use_rslora=use_rslora)
        return replace(numbers, scale=numbers.scale * true_rank / (-(-true_rank // 16) * 16))

    with mock.patch.object(RankNumbers, "of", classmethod(wrong)):
        yield


PLANTED: Mapping[str, Callable[[], AbstractContextManager[None]]] = MappingProxyType(
    {
        "engine.chunk_positions_restart": lambda: _steps(_restart_positions),
        "engine.middle_chunk_positions": lambda: _steps(_restart_middle),
        "engine.base_decode_position": lambda: _steps(_base_position),
        "engine.uniform_by_row": lambda: _steps(_uniform_by_row),
        "engine.freed_early": _freed_early,
        "engine.stale_token_source": lambda: _steps(_known_source),
        "engine.crowd_context": lambda: _steps(_without_last_key),
        "engine.neighbours_adapter": lambda: _steps(_next_slot),
        "engine.mix_weight_ignored": lambda: _steps(_whole_weights),
        "engine.first_row_of_logits": lambda: _steps(_first_row),
        "engine.prefix_without_adapter": lambda: _cache_key(lambda self, mix: ()),
        "engine.prefix_by_name": lambda: _cache_key(lambda self, mix: mix),
        "engine.preempted_token_lost": _preempted_token_lost,
        "engine.graph_keeps_adapters": _graph_keeps_adapters,
        "engine.scaled_by_padded_rank": _scaled_by_padded_rank,
    }
)

CONTROLS: Mapping[str, str] = MappingProxyType(
    {
        "model.tokens": "engine.first_row_of_logits",
        "model.adapters": "engine.scaled_by_padded_rank",
        "model.crowd": "engine.crowd_context",
        "model.overlap": "engine.stale_token_source",
        "model.chunks": "engine.chunk_positions_restart",
        "model.prefix_cache": "engine.prefix_without_adapter",
        "model.preemption": "engine.preempted_token_lost",
        "model.graphs": "engine.graph_keeps_adapters",
    }
)
"""The planted bug that shows that a check can fail."""
