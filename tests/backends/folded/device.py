"""The device: torch's CPU behind a queue."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from polyaccel.backend import Event, HostCopy, TorchDevice

from .work_queue import Queue, QueueEvent


def poison_(tensor: torch.Tensor) -> torch.Tensor:
    """Fill with what spoils every result it reaches: NaN, or an index outside of everything."""
    if tensor.dtype.is_floating_point:
        return tensor.fill_(torch.nan)
    if tensor.dtype == torch.bool:
        return tensor.fill_(True)
    return tensor.fill_(torch.iinfo(tensor.dtype).min // 2)


class QueuedHostCopy(HostCopy):
    """A host array that the queue fills."""

    def __init__(self, queue: Queue, source: torch.Tensor) -> None:
        self._host = torch.empty(source.shape, dtype=source.dtype)
        queue.put(lambda: self._host.copy_(source))
        self._event = QueueEvent(queue)

    def wait(self) -> np.ndarray:
        self._event.synchronize()
        array: np.ndarray = self._host.numpy()
        return array


class FoldedDevice(TorchDevice):
    """New memory is poisoned at once; copies are queued."""

    def __init__(self, queue: Queue) -> None:
        super().__init__("cpu", name="folded:0")
        self.queue = queue

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Poisoned memory; inside a graph it is poisoned again at every replay."""
        tensor = poison_(torch.empty(tuple(shape), dtype=dtype))
        if self.queue.recording:
            self.queue.put(lambda: poison_(tensor))
        return tensor

    def copy_(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        self.queue.put(lambda: destination.copy_(source))

    def download(self, source: torch.Tensor) -> HostCopy:
        return QueuedHostCopy(self.queue, source)

    def record(self) -> Event:
        return QueueEvent(self.queue)

    def synchronize(self) -> None:
        self.queue.flush()
