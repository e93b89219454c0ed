"""Bugs planted in the engine: the controls of the whole-model checks, and the engine's mutants.

Each is a context manager that patches one method for the engines built and run inside it, in this process.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch

from polyaccel.backend import AdapterRows, PackedAdapter, SampleOutput, StepInput, TokenClass
from polyaccel.engine import batch_state, philox
from polyaccel.engine.adapter_manager import AdapterManager
from polyaccel.engine.batch_state import BatchState
from polyaccel.engine.executor import PreparedHandle
from polyaccel.engine.graphs import GraphCache
from polyaccel.engine.prefix_cache import PrefixCache
from polyaccel.engine.process_executor import ProcessExecutor
from polyaccel.engine.request import Sequence
from polyaccel.engine.scheduler import Plan, Scheduler
from polyaccel.engine.step_builder import BuiltStep, StepBuilder
from polyaccel.lora import pack as packing
from polyaccel.lora.adapter_file import LoraPair
from polyaccel.lora.mix import AdapterMix
from polyaccel.lora.numbers import RankNumbers
from polyaccel.lora.receipt import AdapterReceipt
from polyaccel.lora.target import AdapterTarget
from polyaccel_conformance.models.answers import Answer
from polyaccel_conformance.models.engines import Workshop
from polyaccel_conformance.models.planted_layers import PLANTED_LAYERS, edited_logits

Floats32 = npt.NDArray[np.float32]
Edit = Callable[[StepBuilder, BatchState, StepInput], StepInput]


def _kept(owner: object, first: Any) -> Any:
    """What a bug keeps with a part of an engine, ``first`` from the first time on: it may be taken out and planted
    again while the engine lives."""
    return vars(owner).setdefault("_conformance", first)


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


def _weighted(weights: Callable[[Floats32], Floats32]) -> Edit:
    """The weights of a mix are replaced by what they give."""

    def edit(_: StepBuilder, __: BatchState, inputs: StepInput) -> StepInput:
        adapters = {
            name: AdapterRows.build(rows.rows, rows.slots, weights(rows.weights))
            for name, rows in inputs.adapters.items()
        }
        return replace(inputs, adapters=adapters)

    return edit


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

    def wrong(self: GraphCache, inputs: StepInput, rank_rows: int, spare_request_slot: int) -> SampleOutput:
        if inputs.has_adapters:
            kept = _kept(self, {}).setdefault(inputs.tokens, dict(inputs.adapters))
            inputs = replace(inputs, adapters=kept)
        return run(self, inputs, rank_rows, spare_request_slot)

    with mock.patch.object(GraphCache, "run", wrong):
        yield


def _restart_short_middle(_: StepBuilder, __: BatchState, inputs: StepInput) -> StepInput:
    """The positions of a chunk of up to eleven tokens that is not its prompt's last count from its own beginning."""
    last = np.isin(inputs.query_starts[1:] - 1, inputs.logits_rows)
    return _restarted(inputs, ~last & (np.diff(inputs.query_starts) < 12))


@contextmanager
def _first_token_lost() -> Iterator[None]:
    """Where no adapter is loaded, a prompt begins with token 0."""
    place = Scheduler._place

    def wrong(self: Scheduler, sequence: Sequence) -> int | None:
        if not getattr(self._adapters, "_registered", None) and len(sequence.tokens) > 1:
            sequence.tokens[0] = 0
        return place(self, sequence)

    with mock.patch.object(Scheduler, "_place", wrong):
        yield


@contextmanager
def _uncached_first_row() -> Iterator[None]:
    """Among others, with an empty prefix cache and no adapter loaded, a prompt of more than a block goes on from its
    first row."""
    begin, build = Scheduler.__init__, StepBuilder.build

    def wrong_begin(
        self: Scheduler, capacity: Any, state: BatchState, cache: PrefixCache, adapters: Any, tokens: int
    ) -> None:
        begin(self, capacity, state, cache, adapters, tokens)
        _kept(state, (cache, adapters))

    def wrong(self: StepBuilder, plan: Plan) -> BuiltStep:
        built, (cache, adapters) = build(self, plan), _kept(self._state, None)
        inputs = built.inputs
        if not cache.enabled or getattr(adapters, "_registered", None) or inputs.sequences < 2:
            return built
        rows = inputs.logits_rows.copy()
        for first, end in zip(inputs.query_starts[:-1], inputs.query_starts[1:], strict=True):
            if end - first > cache.block_size and inputs.positions[first] == 0:
                rows[rows == end - 1] = first
        return replace(built, inputs=replace(inputs, logits_rows=rows))

    with mock.patch.object(Scheduler, "__init__", wrong_begin), mock.patch.object(StepBuilder, "build", wrong):
        yield


@contextmanager
def _fifth_load() -> Iterator[None]:
    """From the fifth on, adapters that are loaded are taken out of their slots again."""
    place = AdapterManager._place

    def wrong(self: AdapterManager, name: str, handle: PreparedHandle) -> AdapterReceipt:
        receipt = place(self, name, handle)
        if next(_kept(self, itertools.count())) >= 4:
            self._executor.clear_adapter(self._require_slots().get(name).where.slot)
        return receipt

    with mock.patch.object(AdapterManager, "_place", wrong):
        yield


@contextmanager
def _graph_base_rows() -> Iterator[None]:
    """Four and more rows without an adapter go on with the adapters that as many rows had last."""
    run = GraphCache.run

    def wrong(self: GraphCache, inputs: StepInput, rank_rows: int, spare_request_slot: int) -> SampleOutput:
        last = _kept(self, {})
        if inputs.has_adapters:
            last[inputs.tokens] = dict(inputs.adapters), rank_rows
        elif inputs.tokens >= 4 and inputs.tokens in last:
            adapters, rank_rows = last[inputs.tokens]
            inputs = replace(inputs, adapters=adapters)
        return run(self, inputs, rank_rows, spare_request_slot)

    with mock.patch.object(GraphCache, "run", wrong):
        yield


def _short(logits: torch.Tensor) -> torch.Tensor:
    """12 bits of their significands."""
    if logits.dtype != torch.float32:
        return logits
    return (logits.contiguous().view(torch.int32) & ~0xFFF).view(torch.float32)


@contextmanager
def _third_use_of_a_block() -> Iterator[None]:
    """Cached blocks that are found once more after they have been found before are the first of them, again and
    again."""
    lookup = PrefixCache.lookup

    def wrong(self: PrefixCache, key: Hashable, tokens: npt.NDArray[np.int32]) -> tuple[list[int], bytes]:
        blocks, digest = lookup(self, key, tokens)
        hits = _kept(self, Counter[int]())
        used = [hits[block] for block in blocks]
        hits.update(blocks)
        return ([blocks[0]] * len(blocks) if blocks and min(used) > 0 else blocks), digest

    with mock.patch.object(PrefixCache, "lookup", wrong):
        yield


@contextmanager
def _merge_keeps_cache() -> Iterator[None]:
    """Keys and values from before a merge stay in the prefix cache."""
    merge = AdapterManager.merge

    def wrong(self: AdapterManager, name: str, weight: float) -> None:
        clear, self._on_change = self._on_change, lambda: None
        try:
            merge(self, name, weight)
        finally:
            self._on_change = clear

    with mock.patch.object(AdapterManager, "merge", wrong):
        yield


@contextmanager
def _choice_ignored() -> Iterator[None]:
    """All choices of a request draw the same numbers."""
    drawn = philox.uniforms

    def wrong(
        seed: npt.NDArray[np.uint64], choice: npt.NDArray[np.integer], positions: npt.NDArray[np.integer]
    ) -> npt.NDArray[np.float32]:
        return drawn(seed, np.zeros_like(choice), positions)

    with mock.patch.object(philox, "uniforms", wrong), mock.patch.object(batch_state, "uniforms", wrong):
        yield


@contextmanager
def _rank_reads_other_adapter() -> Iterator[None]:
    """The last of several ranks reads the first adapter's files for every adapter."""
    send = ProcessExecutor._send_all

    def wrong(self: ProcessExecutor, message: tuple[object, ...]) -> None:
        if message[0] != "prepare" or self._world < 2:
            return send(self, message)
        kind, token, path, *rest = message
        path_of_last = _kept(self, path)
        with self._sending:
            self._raise_if_dead()
            for worker in self._workers[:-1]:
                worker.connection.send(message)
            self._workers[-1].connection.send((kind, token, path_of_last, *rest))
        return None

    with mock.patch.object(ProcessExecutor, "_send_all", wrong):
        yield


@contextmanager
def _share_scaled() -> Iterator[None]:
    """A module that is cut by its input is scaled by this rank's share of the input once more."""
    pack = packing.pack_adapter

    def weaker(target: AdapterTarget, pair: LoraPair) -> LoraPair:
        share = target.in_cols.size / pair.a.shape[1]
        return replace(pair, numbers=replace(pair.numbers, scale=pair.numbers.scale * share))

    def wrong(matched: Iterable[tuple[AdapterTarget, LoraPair]], **options: Any) -> PackedAdapter:
        return pack([(target, weaker(target, pair)) for target, pair in matched], **options)

    with mock.patch.object(packing, "pack_adapter", wrong):
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
        "engine.mix_weight_ignored": lambda: _steps(_weighted(np.ones_like)),
        "engine.first_row_of_logits": lambda: _steps(_first_row),
        "engine.prefix_without_adapter": lambda: _cache_key(lambda self, mix: ()),
        "engine.prefix_by_name": lambda: _cache_key(lambda self, mix: mix),
        "engine.preempted_token_lost": _preempted_token_lost,
        "engine.graph_keeps_adapters": _graph_keeps_adapters,
        "engine.scaled_by_padded_rank": _scaled_by_padded_rank,
        "engine.mix_sign_lost": lambda: _steps(_weighted(np.abs)),
        "engine.short_chunk_positions": lambda: _steps(_restart_short_middle),
        "engine.first_token_lost": _first_token_lost,
        "engine.uncached_first_row": _uncached_first_row,
        "engine.fifth_load": _fifth_load,
        "engine.graph_base_rows": _graph_base_rows,
        "engine.short_logits": lambda: edited_logits(_short),
        "engine.third_use_of_a_block": _third_use_of_a_block,
        "engine.merge_keeps_cache": _merge_keeps_cache,
        "engine.choice_ignored": _choice_ignored,
        "engine.rank_reads_other_adapter": _rank_reads_other_adapter,
        "engine.share_scaled": _share_scaled,
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


@functools.cache
def plant(name: str) -> None:
    """The bug for the rest of this process. What the reference answers is asked of the engine without it.

    Raises:
        KeyError: no such bug.
    """
    made = {**PLANTED, **PLANTED_LAYERS}[name]
    planted = [made()]
    planted[0].__enter__()
    reference = Workshop.reference

    def right(self: Workshop, *arguments: Any) -> list[Answer]:
        planted.pop().__exit__(None, None, None)
        try:
            return reference(self, *arguments)
        finally:
            planted.append(made())
            planted[0].__enter__()

    setattr(Workshop, "reference", right)  # noqa: B010
