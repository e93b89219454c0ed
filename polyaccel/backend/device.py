"""A device: memory, copies and ordering. The mandatory part of every backend, with a plain-torch form.

Copies and operators on one device are ordered as they were issued (one queue). The host learns that work is done only
through an :class:`Event` or a :class:`HostCopy`; nothing else synchronises.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryInfo:
    """Bytes of device memory. ``free`` is what an allocation may still use."""

    free: int
    total: int


class Event(ABC):
    """A mark in a device's queue."""

    @abstractmethod
    def query(self) -> bool:
        """Whether everything issued before the mark has completed. Does not block."""

    @abstractmethod
    def synchronize(self) -> None:
        """Block the host until it has."""


class DoneEvent(Event):
    """The event of a device that computes before it returns."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        return None


class HostCopy(ABC):
    """A device tensor on its way to the host."""

    @abstractmethod
    def wait(self) -> np.ndarray:
        """Block until the copy has arrived; the array is owned by the caller."""


class ReadyHostCopy(HostCopy):
    """A copy that had arrived when it was asked for."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def wait(self) -> np.ndarray:
        return self._array


ALIGNMENT = 64
"""Bytes to which host memory for tensors is aligned: a cache line, and the widest vector."""


class Device(ABC):
    """One device of a backend. ``index`` counts the backend's devices from 0."""

    index: int
    torch_device: torch.device
    name: str

    @abstractmethod
    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised memory on this device.

        Raises:
            OutOfMemory: with the bytes asked for and free.
        """

    @abstractmethod
    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor: ...

    @abstractmethod
    def upload(self, source: np.ndarray | torch.Tensor) -> torch.Tensor:
        """A new device tensor with the content of a host array; the source may be reused when this returns."""

    @abstractmethod
    def copy_(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        """Copy ``source`` (host or this device, any strides) into ``destination``, casting; ordered, asynchronous."""

    @abstractmethod
    def download(self, source: torch.Tensor) -> HostCopy:
        """Start copying to the host."""

    @abstractmethod
    def record(self) -> Event:
        """Mark the end of what has been issued so far."""

    @abstractmethod
    def synchronize(self) -> None:
        """Block until the device is idle; a pending asynchronous failure is raised here."""

    @abstractmethod
    def memory(self) -> MemoryInfo: ...

    def scope(self) -> AbstractContextManager[object]:
        """Make this the current device for the block; devices without that notion do nothing."""
        return nullcontext()


class TorchDevice(Device):
    """Any torch device, driven synchronously through plain torch. Enough for a first plugin."""

    def __init__(self, torch_device: torch.device | str, *, index: int = 0, name: str | None = None) -> None:
        self.torch_device = torch.device(torch_device)
        self.index = index
        self.name = name or str(self.torch_device)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=dtype, device=self.torch_device)

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        if self.torch_device.type == "cpu":
            return _lazy_zeros(tuple(shape), dtype)
        return torch.zeros(tuple(shape), dtype=dtype, device=self.torch_device)

    def upload(self, source: np.ndarray | torch.Tensor) -> torch.Tensor:
        if isinstance(source, np.ndarray):
            return torch.tensor(source, device=self.torch_device)
        return source.detach().to(self.torch_device, copy=True)

    def copy_(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        destination.copy_(source)

    def download(self, source: torch.Tensor) -> HostCopy:
        return ReadyHostCopy(source.detach().to("cpu", copy=True).numpy())

    def record(self) -> Event:
        return DoneEvent()

    def synchronize(self) -> None:
        if self.torch_device.type not in ("cpu", "meta"):
            torch.get_device_module(self.torch_device).synchronize(self.torch_device)

    def memory(self) -> MemoryInfo:
        """Free and total system memory for the CPU; other devices override this."""
        import os

        page = os.sysconf("SC_PAGE_SIZE")
        return MemoryInfo(free=os.sysconf("SC_AVPHYS_PAGES") * page, total=os.sysconf("SC_PHYS_PAGES") * page)


def _lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    # torch.zeros writes every page; numpy leaves large arrays to the system's zero pages. Room for a KV cache of
    # gigabytes then costs nothing until it is used.
    size = math.prod(shape) * dtype.itemsize
    block = np.zeros(size + ALIGNMENT, dtype=np.uint8)
    offset = -block.ctypes.data % ALIGNMENT
    return torch.from_numpy(block[offset : offset + size]).view(dtype).view(shape)
