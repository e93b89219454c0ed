"""One communication domain: the ranks that share a root info, joined by gloo over the loopback device."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from threading import Lock
from typing import Any

import torch
import torch.distributed as dist

from .codes import HcclRefused, Result

_REDUCE: dict[str, Any] = {
    "sum": dist.ReduceOp.SUM,
    "prod": dist.ReduceOp.PRODUCT,
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
}
_HALF = (torch.float16, torch.bfloat16)

CONNECT_TIMEOUT = 120.0  # HCCL_CONNECT_TIMEOUT.md: seconds, default
EXECUTE_TIMEOUT = 1836.0  # HCCL_EXEC_TIMEOUT.md: seconds, default


def _seconds(variable: str, default: float) -> float:
    """A timeout from the environment. The documents' lower bounds are not enforced, so that tests need not wait."""
    text = os.environ.get(variable, "")
    return float(text) if text else default


def rendezvous_folder() -> Path:
    """Where the ranks of this host meet: CANNSIM_HCCL_FOLDER, or a folder of this user's in the temporary folder."""
    folder = Path(os.environ.get("CANNSIM_HCCL_FOLDER") or Path(tempfile.gettempdir()) / f"cannsim-hccl-{os.getuid()}")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def _connect(key: str, rank: int, size: int, timeout: float) -> Any:
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    options._timeout = timedelta(seconds=timeout)
    store = dist.FileStore(  # type: ignore[attr-defined]
        str(rendezvous_folder() / key), size
    )
    store.set_timeout(timedelta(seconds=timeout))
    return dist.ProcessGroupGloo(store, rank, size, options)


@dataclass(frozen=True)
class _Several:
    """Works of gloo that are waited for together."""

    works: list[Any]

    def wait(self, timeout: timedelta) -> None:
        for work in self.works:
            work.wait(timeout)


@dataclass
class Domain:
    """A communicator of one rank.

    `name` is what HcclGetCommName answers, equal on all ranks. Collectives of HCCL and of fused operators travel over
    gloo groups of their own, since they are issued by different streams. `asynchronous` is what
    HcclGetCommAsyncError answers: set by the first collective that fails, never reset.
    """

    name: str
    key: str
    rank: int
    size: int
    execute_timeout: float
    asynchronous: Result = Result.SUCCESS
    _groups: dict[str, Any] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)

    @classmethod
    def join(cls, name: str, key: str, rank: int, size: int, execute_timeout: float | None = None) -> Domain:
        """Meet the other ranks; HCCL_E_TIMEOUT (EI0006) when not all come within HCCL_CONNECT_TIMEOUT seconds."""
        if not 0 <= rank < size:
            raise HcclRefused(Result.PARAMETER, f"rank {rank} is outside [0, {size - 1}].")
        limit = _seconds("HCCL_CONNECT_TIMEOUT", CONNECT_TIMEOUT)
        domain = cls(name, key, rank, size, execute_timeout or _seconds("HCCL_EXEC_TIMEOUT", EXECUTE_TIMEOUT))
        if size > 1:
            try:
                domain._groups["hccl"] = _connect(key, rank, size, limit)
            except (RuntimeError, dist.DistError) as problem:
                raise HcclRefused(
                    Result.TIMEOUT,
                    f"wait socket establish timeout, role[1] rank[{rank}] timeout[{limit:g} s]: {problem}",
                    "EI0006",
                ) from problem
        return domain

    def _group(self, use: str) -> Any:
        with self._lock:
            if use not in self._groups:
                self._groups[use] = _connect(f"{self.key}-{use}", self.rank, self.size, self.execute_timeout)
            return self._groups[use]

    def _wait(self, use: str, start: Callable[[Any], Any]) -> None:
        """Run a gloo operation to its end; a failure marks the domain and fails the stream (EI0002)."""
        try:
            start(self._group(use)).wait(timedelta(seconds=self.execute_timeout))
        except (RuntimeError, dist.DistError) as problem:
            late = "imed out" in str(problem) or "imeout" in str(problem)
            self.asynchronous = Result.TIMEOUT if late else Result.REMOTE
            raise HcclRefused(
                self.asynchronous,
                f"the collective of {self.name} on rank {self.rank} did not finish within "
                f"{self.execute_timeout:g} s: {problem}",
                "EI0002",
            ) from problem

    def reduce(self, x: torch.Tensor, operation: str = "sum", *, use: str = "hccl") -> torch.Tensor:
        """The reduction of every rank's `x` on every rank; halves are added in float32 and rounded once."""
        total = x.to(torch.float32) if x.dtype in _HALF else x.clone()
        if self.size > 1:
            total = total.contiguous()
            options = dist.AllreduceOptions()
            options.reduceOp = _REDUCE[operation]
            self._wait(use, lambda group: group.allreduce([total], options))
        return total.to(x.dtype)

    def gather(self, x: torch.Tensor, *, use: str = "hccl") -> torch.Tensor:
        """Every rank's `x` (equal shapes), rank after rank along the first axis."""
        if self.size == 1:
            return x.clone()
        parts = [torch.empty_like(x) for _ in range(self.size)]
        self._wait(use, lambda group: group.allgather([parts], [x.contiguous()]))
        return torch.cat(parts)

    def broadcast(self, x: torch.Tensor, root: int) -> None:
        """Overwrite `x` by the root's."""
        if self.size > 1:
            options = dist.BroadcastOptions()
            options.rootRank, options.rootTensor = root, 0
            self._wait("hccl", lambda group: group.broadcast([x], options))

    def exchange(self, pieces: list[torch.Tensor], sizes: list[int], dtype: torch.dtype) -> list[torch.Tensor]:
        """Send pieces[r] to rank r; returns what came from each, `sizes` elements."""
        if self.size == 1:
            return [pieces[0].clone()]
        received = torch.empty(sum(sizes), dtype=dtype)
        sent = torch.cat(pieces)
        options = dist.AllToAllOptions()
        counts = [piece.numel() for piece in pieces]
        self._wait("hccl", lambda group: group.alltoall_base(received, sent, sizes, counts, options))
        return list(torch.ops.aten.split_with_sizes(received, sizes))

    def send(self, x: torch.Tensor, peer: int) -> None:
        """Hand `x` to `peer`; returns when it has been taken."""
        self._wait("hccl", lambda group: group.send([x.contiguous()], peer, 0))

    def receive(self, x: torch.Tensor, peer: int) -> None:
        """Overwrite `x` by what `peer` sends."""
        self._wait("hccl", lambda group: group.recv([x], peer, 0))

    def transfer(self, items: list[tuple[bool, torch.Tensor, int]]) -> None:
        """Several sends (True) and receives (False) of (buffer, peer), all under way at once."""

        def start(group: Any) -> _Several:
            begun = [
                group.send([one.contiguous()], peer, 0) if sends else group.recv([one], peer, 0)
                for sends, one, peer in items
            ]
            return _Several(begun)

        self._wait("hccl", start)

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.size > 1:
            self._wait("hccl", lambda group: group.barrier())

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, for fused operators."""
        return self.reduce(x, use="fused")

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Every rank's `x`, for fused operators."""
        return self.gather(x, use="fused")

    def close(self) -> None:
        """Leave; the store's file goes with the last rank."""
        with self._lock:
            self._groups.clear()
