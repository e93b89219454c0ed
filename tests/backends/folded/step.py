"""Metadata at fixed addresses. ``StepLoader.begin`` is the only way in; kernels know nothing else about a step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from polyaccel.backend import DeviceState, OperatorError, RowSet, Step, StepInput, TokenClass
from polyaccel.backend.step import DEVICE_ARRAYS, AdapterRows, plan_key

from .adapter_store import FoldedAdapterStore
from .device import FoldedDevice, poison_

ROW_SETS: tuple[RowSet, ...] = ("tokens", "logits")
INT64 = frozenset({"token_ids", "positions", "kv_slots"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """What is static about a step: T, S and R, blocks of a table, adapter slots."""

    tokens: int
    sequences: int
    rows: int
    blocks: int
    slots: int

    @classmethod
    def of(cls, inputs: StepInput, slots: int) -> Extent:
        return cls(
            tokens=inputs.tokens,
            sequences=inputs.sequences,
            rows=len(inputs.logits_rows),
            blocks=inputs.block_tables.shape[1],
            slots=slots,
        )

    def fits(self, room: Extent) -> bool:
        return (
            self.tokens <= room.tokens
            and self.sequences <= room.sequences
            and self.rows <= room.rows
            and self.blocks <= room.blocks
            and self.slots == room.slots
        )

    def length(self, name: str) -> int:
        """Entries of an array's first dimension."""
        if name in ("token_ids", "positions", "kv_slots"):
            return self.tokens
        if name in ("logits_rows", "sample_slots", "uniforms"):
            return self.rows
        return self.sequences + (name == "query_starts")


class StepBuffers:
    """One device copy of a step's metadata, overwritten by every step that uses it, in the order of the queue.

    ``mix[row_set]: [rows, slots]`` float32 holds each row's mix weight of each adapter slot.
    """

    def __init__(self, room: Extent, device: FoldedDevice) -> None:
        self.room, self.device = room, device.torch_device
        self._arrays: dict[str, torch.Tensor] = {}
        for name in DEVICE_ARRAYS:
            dtype = torch.int64 if name in INT64 else torch.float32 if name == "uniforms" else torch.int32
            shape = (room.length(name), room.blocks) if name == "block_tables" else (room.length(name),)
            self._arrays[name] = device.empty(shape, dtype)
        self.mix: dict[RowSet, torch.Tensor] = {
            "tokens": device.empty((room.tokens, room.slots), torch.float32),
            "logits": device.empty((room.rows, room.slots), torch.float32),
        }

    def view(self, name: str, extent: Extent) -> torch.Tensor:
        """The rows of an array that a step of this extent has."""
        return self._arrays[name][: extent.length(name)]

    def load(self, inputs: StepInput, last_tokens: torch.Tensor | None) -> None:
        """Overwrite everything with a step's arrays and resolve its token sources."""
        for name, array in self._arrays.items():
            source = torch.from_numpy(np.ascontiguousarray(getattr(inputs, name)))
            poison_(array)
            if name == "block_tables":
                array[: source.shape[0], : source.shape[1]] = source
            else:
                array[: source.shape[0]] = source
        ids = self._arrays["token_ids"][: inputs.tokens]
        sampled = ids < 0
        if last_tokens is not None:
            ids.copy_(torch.where(sampled, last_tokens[(-1 - ids).clamp(min=0)], ids))
        for row_set in ROW_SETS:
            triples, mix = inputs.rows(row_set), self.mix[row_set].zero_()
            where = (torch.from_numpy(triples.rows).long(), torch.from_numpy(triples.slots).long())
            mix.index_put_(where, torch.from_numpy(triples.weights), accumulate=True)


class FoldedStep(Step):
    """A step as it is issued.

    ``rank_rows``: how many rank rows its products cover; a graph's capture sets it to the graph's.
    """

    def __init__(
        self, inputs: StepInput, state: DeviceState, buffers: StepBuffers, extent: Extent, rank_rows: int
    ) -> None:
        self.input, self.state = inputs, state
        self.plan_key = plan_key(inputs.token_class, inputs.has_adapters)
        self.buffers, self.extent, self.rank_rows = buffers, extent, rank_rows
        self.torch_device = buffers.device

    def tensor(self, name: str) -> torch.Tensor:
        if name not in DEVICE_ARRAYS:
            raise OperatorError("Step.tensor", f"no array {name!r}; a step has {', '.join(DEVICE_ARRAYS)}")
        return self.buffers.view(name, self.extent)

    def adapter_tensors(self, row_set: RowSet) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        triples: AdapterRows = self.input.rows(row_set)
        rows, slots = torch.from_numpy(triples.rows).long(), torch.from_numpy(triples.slots).long()
        return rows, slots, torch.from_numpy(triples.weights)


class RunningStep(Step):
    """A step as a kernel sees it while it runs: what the buffers hold now, also when a graph is replayed."""

    def __init__(self, issued: FoldedStep) -> None:
        self.state, self.plan_key = issued.state, issued.plan_key
        self._tensors = {name: issued.buffers.view(name, issued.extent) for name in DEVICE_ARRAYS}
        self.input = StepInput(
            token_class=TokenClass.MIXED,
            token_ids=self._tensors["token_ids"].numpy(),
            positions=self._tensors["positions"].numpy(),
            query_starts=self._tensors["query_starts"].numpy(),
            context_lengths=self._tensors["context_lengths"].numpy(),
            block_tables=self._tensors["block_tables"].numpy(),
            kv_slots=self._tensors["kv_slots"].numpy(),
            request_slots=self._tensors["request_slots"].numpy(),
            logits_rows=self._tensors["logits_rows"].numpy(),
            sample_slots=self._tensors["sample_slots"].numpy(),
            uniforms=self._tensors["uniforms"].numpy(),
        )

    def tensor(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def adapter_tensors(self, row_set: RowSet) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        raise OperatorError("Step.adapter_tensors", "kernels take adapters from the mix tables")


class StepLoader:
    """Queues each step's copy into its buffers: fixed ones for decode, growing ones for everything else."""

    def __init__(self, device: FoldedDevice) -> None:
        self._device = device
        self._decode: StepBuffers | None = None
        self._mixed: StepBuffers | None = None

    def begin(self, inputs: StepInput, state: DeviceState) -> FoldedStep:
        store = state.adapters
        if store is not None and not isinstance(store, FoldedAdapterStore):
            raise OperatorError("begin_step", f"takes a FoldedAdapterStore, not {type(store).__name__}")
        extent = Extent.of(inputs, 0 if store is None else store.slots)
        buffers = self._buffers(inputs, extent, state)
        last_tokens = None if state.sampling is None else state.sampling.last_tokens()
        self._device.queue.put(lambda: buffers.load(inputs, last_tokens))
        rank_rows = 0 if store is None else _last_rank_row(inputs, store)
        return FoldedStep(inputs, state, buffers, extent, rank_rows)

    def _buffers(self, inputs: StepInput, extent: Extent, state: DeviceState) -> StepBuffers:
        if inputs.token_class is TokenClass.DECODE and state.sampling is not None and state.kv is not None:
            rows, blocks = state.sampling.spec.request_slots, state.kv.spec.blocks
            room = Extent(tokens=rows, sequences=rows, rows=rows, blocks=blocks, slots=extent.slots)
            if extent.fits(room):
                if self._decode is None or self._decode.room != room:
                    self._decode = StepBuffers(room, self._device)
                return self._decode
        if self._mixed is None or not extent.fits(self._mixed.room):
            self._mixed = StepBuffers(_roomy(extent), self._device)
        return self._mixed


def _roomy(extent: Extent) -> Extent:
    def up(n: int) -> int:
        return 1 << max(3, (n - 1).bit_length())

    return Extent(
        tokens=up(extent.tokens),
        sequences=up(extent.sequences),
        rows=up(extent.rows),
        blocks=up(extent.blocks),
        slots=extent.slots,
    )


def _last_rank_row(inputs: StepInput, store: FoldedAdapterStore) -> int:
    ranges = store.ranges()
    named = {int(slot) for rows in inputs.adapters.values() for slot in rows.segment_slots}
    return max((r.first_rank_row + r.rank_rows for slot in named if (r := ranges[slot]) is not None), default=0)
