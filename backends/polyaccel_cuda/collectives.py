"""The operators between ranks: calls of the communicator, which launches and counts them itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch

from polyaccel.backend import Communicator


def all_reduce(x: torch.Tensor, comm: Communicator) -> torch.Tensor:
    return comm.all_reduce(x)


def all_gather(x: torch.Tensor, comm: Communicator, dim: int = -1) -> torch.Tensor:
    return comm.all_gather(x, dim)


def reduce_scatter(x: torch.Tensor, comm: Communicator) -> torch.Tensor:
    return comm.reduce_scatter(x)


def all_to_all(x: torch.Tensor, comm: Communicator, send_rows: list[int], receive_rows: list[int]) -> torch.Tensor:
    return comm.all_to_all(x, send_rows, receive_rows)


def broadcast(x: torch.Tensor, comm: Communicator, source: int = 0) -> torch.Tensor:
    return comm.broadcast(x, source)


def barrier(comm: Communicator) -> None:
    comm.barrier()


COLLECTIVES: Mapping[str, Callable[..., object]] = MappingProxyType(
    {
        "all_reduce": all_reduce,
        "all_gather": all_gather,
        "reduce_scatter": reduce_scatter,
        "all_to_all": all_to_all,
        "broadcast": broadcast,
        "barrier": barrier,
    }
)
