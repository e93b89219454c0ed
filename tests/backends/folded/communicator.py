"""Collectives in the order of the queue."""

from __future__ import annotations

import torch

from polyaccel.backend import Communicator

from .device import FoldedDevice


class FoldedCommunicator(Communicator):
    """Queues the collectives of another communicator. Calls are traced when they are issued."""

    def __init__(self, inner: Communicator, device: FoldedDevice) -> None:
        super().__init__()
        self.rank, self.world_size, self.transport = inner.rank, inner.world_size, inner.transport
        self._inner, self._device = inner, device

    def gather_objects(self, value: object) -> list[object]:
        # All ranks have queued the same collectives, so running them first keeps the order alike.
        self._device.queue.flush()
        return self._inner.gather_objects(value)

    def close(self) -> None:
        self._inner.close()

    def _all_reduce(self, x: torch.Tensor) -> None:
        self._device.queue.put(lambda: self._inner.all_reduce(x))

    def _all_gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        shape = list(x.shape)
        shape[dim] *= self.world_size
        out = self._device.empty(shape, x.dtype)
        self._device.queue.put(lambda: out.copy_(self._inner.all_gather(x, dim)))
        return out

    def _reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        out = self._device.empty((x.shape[0] // self.world_size, *x.shape[1:]), x.dtype)
        self._device.queue.put(lambda: out.copy_(self._inner.reduce_scatter(x)))
        return out

    def _all_to_all(self, x: torch.Tensor, send_rows: list[int], receive_rows: list[int]) -> torch.Tensor:
        out = self._device.empty((sum(receive_rows), *x.shape[1:]), x.dtype)
        self._device.queue.put(lambda: out.copy_(self._inner.all_to_all(x, send_rows, receive_rows)))
        return out

    def _broadcast(self, x: torch.Tensor, source: int) -> None:
        self._device.queue.put(lambda: self._inner.broadcast(x, source))

    def _barrier(self) -> None:
        self._device.queue.flush()
        self._inner.barrier()
