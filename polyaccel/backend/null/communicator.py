"""Ranks that agree on their plans and exchange nothing else."""

from __future__ import annotations

import torch

from polyaccel.backend.communicator import Communicator


class NullCommunicator(Communicator):
    """Collectives are traced and take no time; the control plane is that of another communicator."""

    def __init__(self, control: Communicator) -> None:
        super().__init__()
        self.rank, self.world_size = control.rank, control.world_size
        self.transport = "null"
        self._control = control

    def gather_objects(self, value: object) -> list[object]:
        return self._control.gather_objects(value)

    def close(self) -> None:
        self._control.close()

    def _all_reduce(self, x: torch.Tensor) -> None:
        return None

    def _all_gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        shape = list(x.shape)
        shape[dim] *= self.world_size
        return x.new_empty(shape)

    def _reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_empty((x.shape[0] // self.world_size, *x.shape[1:]))

    def _all_to_all(self, x: torch.Tensor, send_rows: list[int], receive_rows: list[int]) -> torch.Tensor:
        return x.new_empty((sum(receive_rows), *x.shape[1:]))

    def _broadcast(self, x: torch.Tensor, source: int) -> None:
        return None

    def _barrier(self) -> None:
        self._control.barrier()
