"""The contract's device over a virtual one."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch

from polyaccel.backend import Device, Event, HostCopy, MemoryInfo
from polyaccel_conformance.simulated.runtime import Runtime, VirtualDevice
from polyaccel_conformance.simulated.stream import Mark, Task
from polyaccel_conformance.simulated.tensor import VirtualTensor, empty_on


class SimulatedEvent(Event):
    """A mark in the stream that was current."""

    def __init__(self, runtime: Runtime, mark: Mark) -> None:
        self._runtime, self._mark = runtime, mark

    def query(self) -> bool:
        return self._runtime.passed(self._mark)

    def synchronize(self) -> None:
        self._runtime.wait(self._mark)


class SimulatedHostCopy(HostCopy):
    """A host array that the stream fills."""

    def __init__(self, runtime: Runtime, host: torch.Tensor, mark: Mark) -> None:
        self._runtime, self._host, self._mark = runtime, host, mark

    def wait(self) -> np.ndarray:
        self._runtime.wait(self._mark)
        array: np.ndarray = self._host.numpy()
        return array


class SimulatedDevice(Device):
    """Everything goes to this device's current stream, whatever device is current."""

    def __init__(self, virtual: VirtualDevice) -> None:
        self.virtual = virtual
        self.runtime = virtual.runtime
        self.index = virtual.index
        self.torch_device = virtual.torch_device
        self.name = f"simulated:{virtual.index}"

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return empty_on(self.virtual, shape, dtype)

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        made = empty_on(self.virtual, shape, dtype)
        inner = made.host
        if self.runtime.kernel_device is not None:
            inner.zero_()
        else:
            self._submit(Task(kernel="zeros", call=inner.zero_, kind="fill"))
        return made

    def upload(self, source: np.ndarray | torch.Tensor) -> torch.Tensor:
        host = torch.from_numpy(np.ascontiguousarray(source)) if isinstance(source, np.ndarray) else source.detach()
        return self.upload_later(host.clone())

    def upload_later(self, source: torch.Tensor) -> torch.Tensor:
        """As ``upload``, of pinned memory: read when the copy runs."""
        made = empty_on(self.virtual, source.shape, source.dtype)
        inner = made.host
        if self.runtime.kernel_device is not None:
            inner.copy_(source)
            return made
        self._submit(Task(kernel="upload", call=lambda: inner.copy_(source), kind="to device"))
        return made

    def copy_(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        destination.copy_(source)

    def download(self, source: torch.Tensor) -> HostCopy:
        host = torch.empty(source.shape, dtype=source.dtype)
        inner = source.host if isinstance(source, VirtualTensor) else source
        self._submit(Task(kernel="download", call=lambda: host.copy_(inner), kind="to host"))
        return SimulatedHostCopy(self.runtime, host, self._mark())

    def record(self) -> Event:
        return SimulatedEvent(self.runtime, self._mark())

    def synchronize(self) -> None:
        self.runtime.wait_device(self.virtual)

    def memory(self) -> MemoryInfo:
        return MemoryInfo(free=self.virtual.capacity - self.virtual.allocated, total=self.virtual.capacity)

    def scope(self) -> AbstractContextManager[object]:
        return self.runtime.use_device(self.virtual)

    def _submit(self, task: Task) -> None:
        self.runtime.submit(task, self.runtime.current_stream(self.virtual))

    def _mark(self) -> Mark:
        return self.runtime.mark(self.runtime.current_stream(self.virtual))
