"""A step's metadata as one block of bytes: filled on the host, moved to the device by one copy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from polyaccel.backend import Device, Event

ALIGNMENT = 64
_TORCH = {np.dtype(np.int32): torch.int32, np.dtype(np.int64): torch.int64, np.dtype(np.float32): torch.float32}
STAGES = 3
"""Copies that may be under way while the next step is prepared."""


@dataclass(frozen=True, slots=True)
class Field:
    """An array of at most ``room`` elements."""

    name: str
    dtype: np.dtype
    room: int


class Arena:
    """Fixed device addresses for a list of fields; each begins on its own cache line.

    Attributes:
        rooms: elements a field may have.
    """

    def __init__(self, fields: Sequence[Field], device: Device) -> None:
        self.rooms = {field.name: field.room for field in fields}
        self._device = device
        self._places: dict[str, tuple[int, np.dtype, int]] = {}
        size = 0
        for field in fields:
            self._places[field.name] = (size, field.dtype, field.room)
            size += -(-field.room * field.dtype.itemsize // ALIGNMENT) * ALIGNMENT
        self._bytes = device.empty((max(size, ALIGNMENT),), torch.uint8)
        self._stages = [torch.empty(max(size, ALIGNMENT), dtype=torch.uint8, pin_memory=True) for _ in range(STAGES)]
        self._hosts = [
            {
                name: stage.numpy()[at : at + room * dtype.itemsize].view(dtype)
                for name, (at, dtype, room) in self._places.items()
            }
            for stage in self._stages
        ]
        self._busy: list[Event | None] = [None] * STAGES
        self._next = 0
        self._views = {
            name: self._bytes[at : at + room * dtype.itemsize].view(_TORCH[dtype])
            for name, (at, dtype, room) in self._places.items()
        }

    def fits(self, lengths: Mapping[str, int]) -> bool:
        return all(length <= self.rooms.get(name, -1) for name, length in lengths.items())

    def load(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Copy the arrays, flat, to their places; asynchronous, in the order of the device's current stream."""
        stage = self._next
        self._next = (stage + 1) % STAGES
        event = self._busy[stage]
        if event is not None:
            event.synchronize()
        host, end = self._hosts[stage], 0
        for name, array in arrays.items():
            host[name][: array.size] = array.reshape(-1)
            at, dtype, _ = self._places[name]
            end = max(end, at + array.size * dtype.itemsize)
        if end:
            self._device.copy_(self._bytes[:end], self._stages[stage][:end])
            self._busy[stage] = self._device.record()

    def view(self, name: str, length: int) -> torch.Tensor:
        """The first ``length`` elements of a field, on the device."""
        return self._views[name][:length]
