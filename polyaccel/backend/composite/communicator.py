"""Ranks over torch.distributed, without its global default group: two engines can live in one process."""

from __future__ import annotations

import pickle
import time
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Protocol, TypeVar, cast
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from polyaccel.backend.backend import RankAddress
from polyaccel.backend.communicator import Communicator
from polyaccel.backend.errors import CommunicationError, ConfigurationError

Result = TypeVar("Result")


class Work(Protocol):
    """A collective that was issued."""

    def wait(self) -> bool: ...


class ProcessGroup(Protocol):
    """What is used of a process group of torch.distributed, whose own classes are not typed."""

    def allreduce(self, tensors: list[torch.Tensor]) -> Work: ...

    def broadcast(self, tensors: list[torch.Tensor], options: dist.BroadcastOptions) -> Work: ...

    def allgather(self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor]) -> Work: ...

    def alltoall_base(
        self, output: torch.Tensor, input: torch.Tensor, output_rows: list[int], input_rows: list[int]
    ) -> Work: ...

    def barrier(self) -> Work: ...


class Store(Protocol):
    """What is used of a key-value store of torch.distributed."""

    def set(self, key: str, value: str) -> None: ...

    def check(self, keys: list[str]) -> bool: ...

    def wait(self, keys: list[str], timeout: timedelta) -> None: ...

    def set_timeout(self, timeout: timedelta) -> None: ...


class TorchCommunicator(Communicator):
    """A gloo group of its own. Tensors of other devices than the CPU travel through host memory.

    ``all_reduce`` is gloo's ring: every element is summed on one rank and then sent around, so all ranks end with its
    bits. Sums are kept in the tensor's dtype. A rank that fails or stays away makes the others raise within the
    timeout; after that the group is of no more use.

    Args:
        address: where the ranks meet.
        transport: ``gloo``; subclasses that override :meth:`_open` bring others.

    Raises:
        ConfigurationError: an address or transport that is not understood.
        CommunicationError: not all ranks arrived within the timeout; names those that did not.
    """

    def __init__(self, address: RankAddress, transport: str = "gloo") -> None:
        super().__init__()
        if not 0 <= address.rank < address.world_size:
            raise ConfigurationError(f"rank {address.rank} of a world of {address.world_size}")
        self.rank = address.rank
        self.world_size = address.world_size
        self.transport = transport
        self._timeout = address.timeout
        self._groups: list[ProcessGroup] = []
        store = self._meet(address)
        self._groups.append(self._run("connect", lambda: self._open(store, address)))
        # A group that is still open while the interpreter shuts down may abort the process: its threads outlive what
        # they use. Finalizers run before that.
        weakref.finalize(self, self._groups.clear)

    def gather_objects(self, value: object) -> list[object]:
        payload = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        sizes = self._gather("gather_objects", torch.tensor([len(payload)], dtype=torch.int64))
        lengths = [int(size) for size in sizes]
        padded = torch.zeros(max(lengths), dtype=torch.uint8)
        padded[: len(payload)] = payload
        parts = self._gather("gather_objects", padded)
        return [pickle.loads(part[:n].numpy().tobytes()) for part, n in zip(parts, lengths, strict=True)]

    def close(self) -> None:
        self._groups.clear()

    # -- collectives -------------------------------------------------------------------------------------------------

    def _all_reduce(self, x: torch.Tensor) -> None:
        self._in_place("all_reduce", x, lambda group, host: group.allreduce([host]))

    def _broadcast(self, x: torch.Tensor, source: int) -> None:
        if not 0 <= source < self.world_size:
            raise ConfigurationError(f"broadcast from rank {source} of {self.world_size}")
        options = dist.BroadcastOptions()
        options.rootRank = source
        self._in_place("broadcast", x, lambda group, host: group.broadcast([host], options))

    def _all_gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        return torch.cat(self._gather("all_gather", _to_host(x)), dim=dim).to(x.device)

    def _reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        total = _to_host(x).clone()
        self._in_place("reduce_scatter", total, lambda group, host: group.allreduce([host]))
        return total.chunk(self.world_size)[self.rank].clone().to(x.device)

    def _all_to_all(self, x: torch.Tensor, send_rows: list[int], receive_rows: list[int]) -> torch.Tensor:
        world = self.world_size
        if len(send_rows) != world or len(receive_rows) != world or min(*send_rows, *receive_rows) < 0:
            raise ConfigurationError(
                f"all_to_all sends {send_rows}, receives {receive_rows}; expected {world} counts >= 0"
            )
        if sum(send_rows) != x.shape[0]:
            raise ConfigurationError(f"all_to_all sends {send_rows} rows of {x.shape[0]}")
        host = _to_host(x)
        received = host.new_empty((sum(receive_rows), *x.shape[1:]))
        self._wait("all_to_all", lambda group: group.alltoall_base(received, host, receive_rows, send_rows))
        return received.to(x.device)

    def _barrier(self) -> None:
        self._wait("barrier", lambda group: group.barrier())

    # -- the group ---------------------------------------------------------------------------------------------------

    def _open(self, store: Store, address: RankAddress) -> ProcessGroup:
        """The process group of this transport over ``store``, which all ranks have joined."""
        if self.transport != "gloo":
            raise ConfigurationError(f"transport {self.transport!r} is not known here; expected 'gloo'")
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = timedelta(seconds=address.timeout)
        options._devices = [_network_device(address)]
        prefixed = dist.PrefixStore("gloo", store)  # type: ignore[attr-defined, arg-type]
        group = dist.ProcessGroupGloo(prefixed, address.rank, address.world_size, options)
        return cast(ProcessGroup, group)

    def _meet(self, address: RankAddress) -> Store:
        begun = time.monotonic()
        names = [f"joined/{rank}" for rank in range(address.world_size)]
        store = self._run("connect", lambda: _store(address))
        self._run("connect", lambda: store.set(names[address.rank], "1"))
        try:
            store.wait(names, timedelta(seconds=max(0.001, address.timeout - (time.monotonic() - begun))))
        except RuntimeError as error:
            absent = [rank for rank, name in enumerate(names) if not store.check([name])]
            raise CommunicationError(
                f"connect on rank {address.rank}: ranks {absent} of {address.world_size} did not arrive at "
                f"{address.init_method} within {address.timeout:g} s"
            ) from error
        return store

    def _gather(self, collective: str, host: torch.Tensor) -> list[torch.Tensor]:
        parts = [torch.empty_like(host) for _ in range(self.world_size)]
        self._wait(collective, lambda group: group.allgather([parts], [host]))
        return parts

    def _in_place(self, collective: str, x: torch.Tensor, issue: Callable[[ProcessGroup, torch.Tensor], Work]) -> None:
        host = _to_host(x)
        self._wait(collective, lambda group: issue(group, host))
        if host is not x:
            x.copy_(host)

    def _wait(self, collective: str, issue: Callable[[ProcessGroup], Work]) -> None:
        if not self._groups:
            raise CommunicationError(f"{collective} on rank {self.rank}: the group was closed")
        group = self._groups[0]
        self._run(collective, lambda: issue(group).wait())

    def _run(self, collective: str, fn: Callable[[], Result]) -> Result:
        begun = time.monotonic()
        try:
            return fn()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise CommunicationError(
                f"{collective} on rank {self.rank} of {self.world_size} failed after {time.monotonic() - begun:.1f} s "
                f"(timeout {self._timeout:g} s): {error}"
            ) from error


def _to_host(x: torch.Tensor) -> torch.Tensor:
    """x itself where gloo can take it: dense and on the CPU."""
    return x.contiguous() if x.device.type == "cpu" else x.cpu().contiguous()


def _store(address: RankAddress) -> Store:
    parts = urlsplit(address.init_method)
    timeout = timedelta(seconds=address.timeout)
    if parts.scheme == "file" and parts.path:
        store: Store = dist.FileStore(parts.path, address.world_size)  # type: ignore[attr-defined]
    elif parts.scheme == "tcp" and parts.hostname and parts.port:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            parts.hostname,
            parts.port,
            address.world_size,
            is_master=address.rank == 0,
            timeout=timeout,
            wait_for_workers=False,
        )
    else:
        raise ConfigurationError(f"init_method {address.init_method!r}, expected file:///PATH or tcp://HOST:PORT")
    store.set_timeout(timeout)
    return store


def _network_device(address: RankAddress) -> object:
    """Loopback where the ranks meet on this host: its own name need not resolve there."""
    host = urlsplit(address.init_method).hostname
    if host in (None, "localhost", "127.0.0.1", "::1"):
        return dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")
    return dist.ProcessGroupGloo.create_default_device()
