"""A device without memory: tensors are shapes, work is time that passes."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch

from polyaccel.backend.device import Device, Event, HostCopy, MemoryInfo


class _At(Event):
    """An event that completes at a point in time (seconds of ``time.perf_counter``)."""

    def __init__(self, when: float) -> None:
        self._when = when

    def query(self) -> bool:
        return time.perf_counter() >= self._when

    def synchronize(self) -> None:
        remaining = self._when - time.perf_counter()
        if remaining > 0:
            time.sleep(remaining)


class _LateCopy(HostCopy):
    """Values that may be read once the event has completed."""

    def __init__(self, array: np.ndarray, event: Event) -> None:
        self._array, self._event = array, event

    def wait(self) -> np.ndarray:
        self._event.synchronize()
        return self._array


class NullDevice(Device):
    """Tensors live on torch's meta device. ``busy(seconds)`` queues work that takes that long.

    ``memory`` reports a fixed 16 GiB, so that capacities do not depend on the machine.
    """

    index = 0
    name = "null"
    torch_device = torch.device("meta")

    def __init__(self) -> None:
        self._idle_at = 0.0

    def busy(self, seconds: float) -> None:
        self._idle_at = max(self._idle_at, time.perf_counter()) + seconds

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=dtype, device="meta")

    zeros = empty

    def upload(self, source: np.ndarray | torch.Tensor) -> torch.Tensor:
        tensor = torch.from_numpy(source) if isinstance(source, np.ndarray) else source
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    def copy_(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        return None

    def download(self, source: torch.Tensor) -> HostCopy:
        """Host tensors (the scripted ids) arrive when the queued work is done; anything else arrives as zeros."""
        array = source.numpy() if source.device.type == "cpu" else np.zeros(tuple(source.shape), dtype=np.float32)
        return _LateCopy(array, self.record())

    def record(self) -> Event:
        return _At(self._idle_at)

    def synchronize(self) -> None:
        self.record().synchronize()

    def memory(self) -> MemoryInfo:
        return MemoryInfo(free=16 << 30, total=16 << 30)
