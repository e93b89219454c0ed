"""Metadata at fixed addresses: ``StepLoader.begin`` is the only way in, and kernels read it when they run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from polyaccel.backend import AdapterRows, DeviceState, OperatorError, RowSet, Step, StepInput, TokenClass
from polyaccel.backend.step import DEVICE_ARRAYS, plan_key
from polyaccel_conformance.simulated.device import SimulatedDevice
from polyaccel_conformance.simulated.runtime import Memory
from polyaccel_conformance.simulated.stream import Task
from polyaccel_conformance.simulated.tensor import VirtualTensor, empty_on, poison_

ROW_SETS: tuple[RowSet, ...] = ("tokens", "logits", "vision")
_INT64 = frozenset({"token_ids", "positions", "kv_slots"})
_OF_ROWS = ("logits_rows", "sample_slots", "uniforms")
_OF_TOKENS = ("token_ids", "positions", "kv_slots")


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """What a launch knows about a step: T, S and R, and the width of the block tables."""

    tokens: int
    sequences: int
    rows: int
    blocks: int

    @classmethod
    def of(cls, inputs: StepInput) -> Extent:
        return cls(
            tokens=inputs.tokens,
            sequences=inputs.sequences,
            rows=len(inputs.logits_rows),
            blocks=inputs.block_tables.shape[1],
        )

    def fits(self, room: Extent) -> bool:
        return (
            self.tokens <= room.tokens
            and self.sequences <= room.sequences
            and self.rows <= room.rows
            and self.blocks <= room.blocks
        )

    def length(self, name: str) -> int:
        """Entries of an array's first dimension."""
        if name in _OF_TOKENS:
            return self.tokens
        return self.rows if name in _OF_ROWS else self.sequences + (name == "query_starts")


class StepBuffers:
    """One device copy of a step's metadata, overwritten by every step that uses it, in the order of the stream.

    ``triples``: the adapter rows of each row set, as read by kernels; their number is data like the rest.
    """

    def __init__(self, room: Extent, device: SimulatedDevice) -> None:
        self.room = room
        self.triples: dict[RowSet, AdapterRows] = {}
        self._held: dict[Extent, dict[str, np.ndarray]] = {}
        self.arrays: dict[str, VirtualTensor] = {}
        for name in DEVICE_ARRAYS:
            dtype = torch.int64 if name in _INT64 else torch.float32 if name == "uniforms" else torch.int32
            shape = (room.length(name), room.blocks) if name == "block_tables" else (room.length(name),)
            self.arrays[name] = empty_on(device.virtual, shape, dtype)

    @property
    def anchor(self) -> VirtualTensor:
        return self.arrays["token_ids"]

    def view(self, name: str, extent: Extent) -> VirtualTensor:
        """The rows of an array that a step of this extent has."""
        whole = self.arrays[name]
        return VirtualTensor(whole.host[: extent.length(name)], whole.memory)

    def held(self, extent: Extent) -> dict[str, np.ndarray]:
        """The same memory as arrays, by name."""
        found = self._held.get(extent)
        if found is None:
            found = {name: self.view(name, extent).host.numpy() for name in DEVICE_ARRAYS}
            self._held[extent] = found
        return found

    def load(self, inputs: StepInput, state: DeviceState) -> None:
        """On the device: overwrite everything, and resolve token sources to the ids sampled by then."""
        for name, array in self.arrays.items():
            source = torch.from_numpy(np.ascontiguousarray(getattr(inputs, name)))
            target = poison_(array.host)
            if name == "block_tables":
                target[: source.shape[0], : source.shape[1]] = source
            else:
                target[: source.shape[0]] = source
        ids = self.arrays["token_ids"].host[: inputs.tokens]
        sampled = ids < 0
        if bool(sampled.any()) and state.sampling is not None:
            last = state.sampling.last_tokens()
            assert isinstance(last, VirtualTensor)
            ids.copy_(torch.where(sampled, last.host[(-1 - ids).clamp(min=0)], ids))
        self.triples = {row_set: inputs.rows(row_set) for row_set in ROW_SETS}


class SimulatedStep(Step):
    """A step as it is issued: host arrays for the core, fixed buffers for kernels."""

    def __init__(self, inputs: StepInput, state: DeviceState, buffers: StepBuffers) -> None:
        self.input, self.state, self.buffers = inputs, state, buffers
        self.torch_device = buffers.anchor.device
        self.extent = Extent.of(inputs)
        self.plan_key = plan_key(inputs.token_class, inputs.has_adapters)

    def tensor(self, name: str) -> torch.Tensor:
        if name not in DEVICE_ARRAYS:
            raise OperatorError("Step.tensor", f"no array {name!r}; a step has {', '.join(DEVICE_ARRAYS)}")
        return self.buffers.view(name, self.extent)

    def adapter_tensors(self, row_set: RowSet) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        memory: Memory = self.buffers.anchor.memory
        return tuple(VirtualTensor(t, memory) for t in _tensors(self.input.rows(row_set)))  # type: ignore[return-value]

    def has_more_rank_rows(self, covered: int) -> bool:
        """Whether the step names a slot whose rank rows a graph of this many does not cover."""
        store = self.state.adapters
        if store is None:
            return False
        ranges = [store.ranges()[slot] for rows in self.input.adapters.values() for slot in rows.segment_slots.tolist()]
        return any(where is not None and where.first_rank_row + where.rank_rows > covered for where in ranges)

    def running(self) -> RunningStep:
        """What a kernel sees that was launched with this step and runs now."""
        return RunningStep(self.buffers, self.extent, self.state)


class RunningStep(Step):
    """Views of the fixed buffers: what they hold now, also when a graph is replayed."""

    def __init__(self, buffers: StepBuffers, extent: Extent, state: DeviceState) -> None:
        self.state, self._buffers, self._extent = state, buffers, extent
        arrays = buffers.held(extent)
        self.input = StepInput(token_class=TokenClass.MIXED, adapters=dict(buffers.triples), **arrays)
        self.plan_key = plan_key(TokenClass.MIXED, self.input.has_adapters)

    def tensor(self, name: str) -> torch.Tensor:
        return self._buffers.view(name, self._extent)

    def adapter_tensors(self, row_set: RowSet) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return _tensors(self.input.rows(row_set))


def _tensors(triples: AdapterRows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, slots = torch.from_numpy(triples.rows).long(), torch.from_numpy(triples.slots).long()
    return rows, slots, torch.from_numpy(triples.weights)


class StepLoader:
    """Queues each step's copy into the device's buffers: fixed ones for decode, growing ones for everything else."""

    def __init__(self, device: SimulatedDevice) -> None:
        self._device = device
        self._decode: StepBuffers | None = None
        self._mixed: StepBuffers | None = None

    def begin(self, inputs: StepInput, state: DeviceState) -> SimulatedStep:
        device = self._device
        buffers = self._buffers(inputs, state)
        task = Task(kernel="begin_step", call=lambda: buffers.load(inputs, state), kind="to device")
        device.runtime.submit(task, device.runtime.current_stream(device.virtual))
        return SimulatedStep(inputs, state, buffers)

    def _buffers(self, inputs: StepInput, state: DeviceState) -> StepBuffers:
        extent = Extent.of(inputs)
        if inputs.token_class is TokenClass.DECODE and state.sampling is not None and state.kv is not None:
            rows = state.sampling.spec.request_slots
            room = Extent(tokens=rows, sequences=rows, rows=rows, blocks=state.kv.spec.blocks)
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
        tokens=up(extent.tokens), sequences=up(extent.sequences), rows=up(extent.rows), blocks=up(extent.blocks)
    )
