"""One NPU: memory of torch_npu's caching allocator, copies and events on its current stream."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from polyaccel.backend import CommunicationError, Event, HostCopy, MemoryInfo, OperatorError, OutOfMemory, TorchDevice
from polyaccel_npu import runtime
from polyaccel_npu.chip import Chip, chip_of
from polyaccel_npu.errors import parse
from polyaccel_npu.issue import Issuer


class NpuEvent(Event):
    """A mark in the current stream of a device. Waiting for it is where asynchronous failures come to light."""

    def __init__(self, device: torch.device, issuer: Issuer) -> None:
        self._issuer = issuer
        npu = runtime.npu()
        with npu.device(device):
            self._stream = npu.current_stream()
            self._event = npu.Event()
            # torch_npu tells a failure of the queue to whoever adds to it next, and this adds to it.
            waited(issuer, lambda: self._event.record(self._stream))

    def query(self) -> bool:
        return bool(waited(self._issuer, self._event.query))

    def synchronize(self) -> None:
        waited(self._issuer, self._event.synchronize)


class PinnedCopy(HostCopy):
    """A copy on its way into pinned memory of its own."""

    def __init__(self, source: torch.Tensor, issuer: Issuer) -> None:
        self._host = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
        with runtime.npu().device(source.device):
            waited(issuer, lambda: self._host.copy_(source.detach(), non_blocking=True))
        self._event = NpuEvent(source.device, issuer)

    def wait(self) -> np.ndarray:
        self._event.synchronize()
        return self._host.numpy().copy()


class NpuDevice(TorchDevice):
    """Asynchronous: everything is ordered on the device's current stream.

    Attributes:
        chip: what this device is.
    """

    def __init__(self, index: int, issuer: Issuer) -> None:
        name = str(runtime.npu().get_device_name(index))
        super().__init__(torch.device("npu", index), index=index, name=name)
        self.chip: Chip = chip_of(name)
        self._issuer = issuer

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return self._allocate(torch.empty, shape, dtype)

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return self._allocate(torch.zeros, shape, dtype)

    def upload(self, source: np.ndarray | torch.Tensor) -> torch.Tensor:
        host = torch.from_numpy(np.ascontiguousarray(source)) if isinstance(source, np.ndarray) else source.detach()
        self._issuer.health.check()
        with self.scope():
            return host.to(self.torch_device, copy=True)

    def copy_(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        self._issuer.health.check()
        with self.scope():
            waited(
                self._issuer,
                lambda: destination.copy_(source, non_blocking=source.device.type != "cpu" or source.is_pinned()),
            )

    def download(self, source: torch.Tensor) -> HostCopy:
        return PinnedCopy(source, self._issuer)

    def record(self) -> Event:
        return NpuEvent(self.torch_device, self._issuer)

    def synchronize(self) -> None:
        waited(self._issuer, lambda: runtime.npu().synchronize(self.torch_device))
        if self._issuer.journal is not None:
            self._issuer.journal.clear()

    def memory(self) -> MemoryInfo:
        """Memory that the allocator has reserved and does not use counts as free."""
        npu = runtime.npu()
        free, total = npu.mem_get_info(self.torch_device)
        idle = npu.memory_reserved(self.torch_device) - npu.memory_allocated(self.torch_device)
        return MemoryInfo(free=free + idle, total=total)

    def scope(self) -> AbstractContextManager[object]:
        scope: AbstractContextManager[object] = runtime.npu().device(self.torch_device)
        return scope

    def _allocate(self, make: Any, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        runtime.npu()
        if dtype is torch.bfloat16 and not self.chip.bfloat16:
            raise OperatorError("allocate", f"{self.name}: chip {self.chip.family} has no bfloat16; use float16")
        try:
            result = make(tuple(shape), dtype=dtype, device=self.torch_device)
        except torch.OutOfMemoryError as error:
            needed, free = math.prod(shape) * dtype.itemsize, self.memory().free
            raise OutOfMemory(f"{self.name}: {needed} bytes asked for, {free} free") from error
        assert isinstance(result, torch.Tensor)
        return result


def waited(issuer: Issuer, wait: Any) -> Any:
    """``wait()``, with what it raises explained; nothing is returned once the device is lost.

    Raises:
        DeviceLost: a call since the last wait failed; caused by a CommunicationError where that was a collective.
    """
    issuer.health.check()
    try:
        result = wait()
    except RuntimeError as error:
        failure, rank = parse(str(error)), issuer.launcher.rank
        # Whatever a wait brings to light was issued before it.
        lost = issuer.health.lose(failure, rank)
        if not failure.communication:
            raise lost from error
        cause = CommunicationError(f"{'' if rank is None else f'rank {rank}: '}{failure}")
        cause.__cause__ = error
        raise lost from cause
    return result
