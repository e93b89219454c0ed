"""One GPU: memory of torch's caching allocator, copies and events on its current stream."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch

from polyaccel.backend import Event, HostCopy, MemoryInfo, OutOfMemory, TorchDevice

Check = Callable[[], None]
"""Raises if what the device computed is worth nothing, as after a collective that was given up."""


def sound() -> None:
    """The check of a device that no group of ranks uses."""


class CudaEvent(Event):
    """A mark in the current stream of a device."""

    def __init__(self, device: torch.device, check: Check = sound) -> None:
        self._check = check
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        with torch.cuda.device(device):
            self._event.record()

    def query(self) -> bool:
        return bool(self._event.query())  # type: ignore[no-untyped-call]

    def synchronize(self) -> None:
        self._event.synchronize()
        self._check()


class PinnedCopy(HostCopy):
    """A copy on its way into pinned memory of its own."""

    def __init__(self, source: torch.Tensor, check: Check = sound) -> None:
        with torch.cuda.device(source.device):
            self._host = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
            self._host.copy_(source.detach(), non_blocking=True)
        self._event = CudaEvent(source.device, check)

    def wait(self) -> np.ndarray:
        self._event.synchronize()
        # The pinned memory goes back to its pool with this object.
        return self._host.numpy().copy()


class CudaDevice(TorchDevice):
    """Asynchronous: everything is ordered on the device's current stream. ``check`` is asked after every wait."""

    def __init__(self, index: int, check: Check = sound) -> None:
        self._check = check
        super().__init__(torch.device("cuda", index), index=index, name=torch.cuda.get_device_name(index))

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return self._allocate(torch.empty, shape, dtype)

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return self._allocate(torch.zeros, shape, dtype)

    def copy_(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        with self.scope():
            destination.copy_(source, non_blocking=source.device.type != "cpu" or source.is_pinned())

    def download(self, source: torch.Tensor) -> HostCopy:
        return PinnedCopy(source, self._check)

    def record(self) -> Event:
        return CudaEvent(self.torch_device, self._check)

    def synchronize(self) -> None:
        super().synchronize()
        self._check()

    def memory(self) -> MemoryInfo:
        """Memory that the allocator has reserved and does not use counts as free."""
        free, total = torch.cuda.mem_get_info(self.torch_device)
        idle = torch.cuda.memory_reserved(self.torch_device) - torch.cuda.memory_allocated(self.torch_device)
        return MemoryInfo(free=free + idle, total=total)

    def scope(self) -> AbstractContextManager[object]:
        return torch.cuda.device(self.torch_device)

    def _allocate(self, make: object, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        try:
            result = make(tuple(shape), dtype=dtype, device=self.torch_device)  # type: ignore[operator]
        except torch.OutOfMemoryError as error:
            needed, free = math.prod(shape) * dtype.itemsize, self.memory().free
            raise OutOfMemory(f"{self.name}: {needed} bytes asked for, {free} free") from error
        assert isinstance(result, torch.Tensor)
        return result
