"""A group of ranks over NCCL, without torch's global default group."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from types import MappingProxyType
from typing import Any

import torch
from torch._C import _distributed_c10d as c10d

LIBRARY_SECONDS = 7 * 24 * 3600
"""The library's own watch, which ends the process where it fires, is to stay silent: ours comes first."""
SETTINGS: Mapping[str, str] = MappingProxyType(
    {
        # A peer that is gone must become an error of ours; the library's answer is to abort this process.
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
        "TORCH_NCCL_ENABLE_MONITORING": "0",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    }
)


@contextmanager
def settings(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for the block, which libraries read while they are set up; then what was there before."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class NcclGroup:
    """One NCCL communicator, made at once: nothing is set up inside a step or a capture.

    All methods are asynchronous and run on the current stream of the device, which must be current; tensors are
    contiguous and not empty. Sums are NCCL's rings or trees: every element is summed along one path in one order and
    the finished number is handed to all, so all ranks have its bits.

    Args:
        store: of this group alone; all ranks have joined it.
        device: the rank's own; no two ranks may share one.

    Raises:
        RuntimeError: as torch reports it.
    """

    def __init__(self, store: c10d.Store, rank: int, world_size: int, device: torch.device) -> None:
        self.device = device
        self.world_size = world_size
        process_group: Any = c10d.ProcessGroupNCCL
        options = process_group.Options()
        options._timeout = timedelta(seconds=LIBRARY_SECONDS)
        with settings(SETTINGS), torch.cuda.device(device):
            self.backend: Any = process_group(store, rank, world_size, options)
            self.backend._set_sequence_number_for_group()
            self.backend.eager_connect_single_device(device)
            self._rehearse()

    def all_reduce(self, x: torch.Tensor) -> None:
        _ordered(self.backend.allreduce([x], _on_this_stream(c10d.AllreduceOptions())))

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """``[world_size, *x.shape]``."""
        out = x.new_empty((self.world_size, *x.shape))
        _ordered(self.backend._allgather_base(out, x, _on_this_stream(c10d.AllgatherOptions())))
        return out

    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        out = x.new_empty((x.shape[0] // self.world_size, *x.shape[1:]))
        _ordered(self.backend._reduce_scatter_base(out, x, _on_this_stream(c10d.ReduceScatterOptions())))
        return out

    def all_to_all(self, x: torch.Tensor, send_rows: list[int], receive_rows: list[int]) -> torch.Tensor:
        """Rows by rank; x, and what is received, may be empty."""
        out = x.new_empty((sum(receive_rows), *x.shape[1:]))
        if x.numel() or out.numel():
            options = _on_this_stream(c10d.AllToAllOptions())
            _ordered(self.backend.alltoall_base(out, x, receive_rows, send_rows, options))
        return out

    def broadcast(self, x: torch.Tensor, source: int) -> None:
        options = _on_this_stream(c10d.BroadcastOptions())
        options.rootRank = source
        _ordered(self.backend.broadcast([x], options))

    def abort(self) -> None:
        """Make the group's kernels return and free it, whatever the other ranks do. From any thread."""
        self.backend.abort()

    def _rehearse(self) -> None:
        # NCCL opens the connections of a collective when it is first called.
        x = torch.ones(self.world_size, device=self.device)
        ones = [1] * self.world_size
        self.all_reduce(x)
        self.all_gather(x)
        self.reduce_scatter(x)
        self.all_to_all(x, ones, ones)
        self.broadcast(x, 0)
        torch.cuda.synchronize(self.device)


def _on_this_stream(options: Any) -> Any:
    """Without a stream of the library's own, where torch offers that."""
    if hasattr(options, "asyncOp"):
        options.asyncOp = False
    return options


def _ordered(work: Any) -> None:
    """The current stream waits; without a stream of the library's own there may be nothing to wait for."""
    if work is not None:
        work.wait()
