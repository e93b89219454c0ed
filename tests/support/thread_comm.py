"""Ranks as threads of one process, so that tensor parallelism is tested without processes or a network."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

import torch

from polyaccel.backend.communicator import Communicator

T = TypeVar("T")
TIMEOUT = 60.0


class ThreadGroup:
    """A world of ranks that meet at a barrier; one failing rank releases the others."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._barrier = threading.Barrier(world_size, timeout=TIMEOUT)
        self._board: list[object] = [None] * world_size

    def exchange(self, rank: int, value: T) -> list[T]:
        """Every rank's value, in rank order. Nobody may change a value before all are done with it."""
        self._board[rank] = value
        self._barrier.wait()
        values = list(self._board)
        self._barrier.wait()
        return values  # type: ignore[return-value]

    def wait(self) -> None:
        self._barrier.wait()

    def abort(self) -> None:
        self._barrier.abort()


class ThreadCommunicator(Communicator):
    """Collectives over tensors of one process. Sums run in rank order on every rank, so that all get identical bits."""

    transport = "threads"

    def __init__(self, group: ThreadGroup, rank: int) -> None:
        super().__init__()
        self._group = group
        self.rank = rank
        self.world_size = group.world_size

    def gather_objects(self, value: object) -> list[object]:
        return self._group.exchange(self.rank, value)

    def close(self) -> None:
        return None

    def _all_reduce(self, x: torch.Tensor) -> None:
        parts = self._group.exchange(self.rank, x)
        total = parts[0].clone()
        for part in parts[1:]:
            total += part
        self._group.wait()
        x.copy_(total)

    def _all_gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        gathered = torch.cat(self._group.exchange(self.rank, x), dim)
        self._group.wait()
        return gathered

    def _reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        total = x.clone()
        self._all_reduce(total)
        return total.chunk(self.world_size)[self.rank].clone()

    def _all_to_all(self, x: torch.Tensor, send_rows: list[int], receive_rows: list[int]) -> torch.Tensor:
        sent = self._group.exchange(self.rank, torch.split(x, send_rows))
        received = torch.cat([parts[self.rank] for parts in sent])
        self._group.wait()
        assert received.shape[0] == sum(receive_rows)
        return received

    def _broadcast(self, x: torch.Tensor, source: int) -> None:
        sent = self._group.exchange(self.rank, x)[source].clone()
        self._group.wait()
        x.copy_(sent)

    def _barrier(self) -> None:
        self._group.wait()


def run_ranks(world_size: int, work: Callable[[ThreadCommunicator], T]) -> list[T]:
    """Run ``work`` on every rank in a thread of its own; results in rank order, or the first failure raised here."""
    group = ThreadGroup(world_size)
    results: list[T | None] = [None] * world_size
    failures: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = work(ThreadCommunicator(group, rank))
        except BaseException as error:
            # The barrier that it breaks on the other ranks fails later than its cause.
            failures.append(error)
            group.abort()

    threads = [threading.Thread(target=run, args=(rank,), name=f"rank {rank}") for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return results  # type: ignore[return-value]
