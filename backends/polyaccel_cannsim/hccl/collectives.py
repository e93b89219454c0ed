"""Collectives and point-to-point transfers on raw device memory.

Documents: cann/hccl docs/zh/api_ref/comm_op_interface/<function>.md; each function returns what its stream runs.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..descriptor import bytes_at
from ..registry import hccl
from .codes import HcclRefused, Result, check_move, check_reduce, dtype_of
from .domain import Domain
from .domains import domains_of

if TYPE_CHECKING:
    from ..simulator import Simulator

PAGES = "cann/hccl docs/zh/api_ref/comm_op_interface/"

Compute = Callable[[], None]


def _view(function: str, address: int | None, count: int, dtype: torch.dtype, offset: int = 0) -> torch.Tensor:
    if not address and count:
        raise HcclRefused(Result.POINTER, f"{function}: a buffer of {count} elements is a null pointer.")
    return bytes_at(address or 0, dtype, (count,), (1,), offset)


def _open(simulator: Simulator, function: str, handle: int | None, number: int) -> tuple[Domain, torch.dtype]:
    domain = domains_of(simulator).get(function, handle)
    dtype = dtype_of(function, number)
    check_move(function, simulator.settings.soc.chip, dtype)
    return domain, dtype


def _root(function: str, domain: Domain, root: int) -> None:
    if root >= domain.size:
        raise HcclRefused(Result.PARAMETER, f"{function}: root {root} is outside [0, {domain.size - 1}].")


def _counts(function: str, address: int | None, size: int) -> list[int]:
    if not address:
        raise HcclRefused(Result.POINTER, f"{function}: the counts or displacements are a null pointer.")
    return list(struct.unpack(f"{size}Q", ctypes.string_at(address, 8 * size)))


@hccl("HcclAllReduce", "pointer pointer uint64 int32 int32 pointer stream", source=f"{PAGES}HcclAllReduce.md")
def all_reduce(
    send: int | None,
    receive: int | None,
    count: int,
    number: int,
    operation: int,
    handle: int | None,
    stream: int | None,
    *,
    simulator: Simulator,
) -> Compute:
    """receive = the reduction of every rank's send, `count` elements."""
    domain, dtype = _open(simulator, "HcclAllReduce", handle, number)
    name = check_reduce("HcclAllReduce", simulator.settings.soc.chip, dtype, operation)
    source, target = (_view("HcclAllReduce", address, count, dtype) for address in (send, receive))
    return lambda: _copy(target, domain.reduce(source, name))


def _copy(target: torch.Tensor, values: torch.Tensor) -> None:
    target.copy_(values)


@hccl("HcclReduce", "pointer pointer uint64 int32 int32 uint32 pointer stream", source=f"{PAGES}HcclReduce.md")
def reduce(
    send: int | None,
    receive: int | None,
    count: int,
    number: int,
    operation: int,
    root: int,
    handle: int | None,
    stream: int | None,
    *,
    simulator: Simulator,
) -> Compute:
    """On the root: receive = the reduction of every rank's send."""
    domain, dtype = _open(simulator, "HcclReduce", handle, number)
    _root("HcclReduce", domain, root)
    name = check_reduce("HcclReduce", simulator.settings.soc.chip, dtype, operation)
    source = _view("HcclReduce", send, count, dtype)

    def compute() -> None:
        total = domain.reduce(source, name)
        if domain.rank == root:
            _view("HcclReduce", receive, count, dtype).copy_(total)

    return compute


@hccl("HcclReduceScatter", "pointer pointer uint64 int32 int32 pointer stream", source=f"{PAGES}HcclReduceScatter.md")
def reduce_scatter(
    send: int | None,
    receive: int | None,
    count: int,
    number: int,
    operation: int,
    handle: int | None,
    stream: int | None,
    *,
    simulator: Simulator,
) -> Compute:
    """receive = this rank's `count` elements of the reduction of send, which holds `count` a rank."""
    domain, dtype = _open(simulator, "HcclReduceScatter", handle, number)
    name = check_reduce("HcclReduceScatter", simulator.settings.soc.chip, dtype, operation)
    source = _view("HcclReduceScatter", send, count * domain.size, dtype)
    target = _view("HcclReduceScatter", receive, count, dtype)
    return lambda: _copy(target, domain.reduce(source, name)[domain.rank * count : (domain.rank + 1) * count])


@hccl("HcclAllGather", "pointer pointer uint64 int32 pointer stream", source=f"{PAGES}HcclAllGather.md")
def all_gather(
    send: int | None,
    receive: int | None,
    count: int,
    number: int,
    handle: int | None,
    stream: int | None,
    *,
    simulator: Simulator,
) -> Compute:
    """receive = every rank's `count` elements, rank after rank."""
    domain, dtype = _open(simulator, "HcclAllGather", handle, number)
    source = _view("HcclAllGather", send, count, dtype)
    target = _view("HcclAllGather", receive, count * domain.size, dtype)
    return lambda: _copy(target, domain.gather(source))


@hccl("HcclBroadcast", "pointer uint64 int32 uint32 pointer stream", source=f"{PAGES}HcclBroadcast.md")
def broadcast(
    buffer: int | None,
    count: int,
    number: int,
    root: int,
    handle: int | None,
    stream: int | None,
    *,
    simulator: Simulator,
) -> Compute:
    """buffer = the root's."""
    domain, dtype = _open(simulator, "HcclBroadcast", handle, number)
    _root("HcclBroadcast", domain, root)
    target = _view("HcclBroadcast", buffer, count, dtype)
    return lambda: domain.broadcast(target, root)


@hccl("HcclScatter", "pointer pointer uint64 int32 uint32 pointer stream", source=f"{PAGES}HcclScatter.md")
def scatter(
    send: int | None,
    receive: int | None,
    count: int,
    number: int,
    root: int,
    handle: int | None,
    stream: int | None,
    *,
    simulator: Simulator,
) -> Compute:
    """receive = this rank's `count` elements of the root's send."""
    domain, dtype = _open(simulator, "HcclScatter", handle, number)
    _root("HcclScatter", domain, root)
    target = _view("HcclScatter", receive, count, dtype)

    def compute() -> None:
        if domain.rank == root:
            whole = _view("HcclScatter", send, count * domain.size, dtype).clone()
        else:
            whole = torch.empty(count * domain.size, dtype=dtype)
        domain.broadcast(whole, root)
        target.copy_(whole[domain.rank * count : (domain.rank + 1) * count])

    return compute


@hccl(
    "HcclAlltoAllV",
    "pointer pointer pointer int32 pointer pointer pointer int32 pointer stream",
    source=f"{PAGES}HcclAlltoAllV.md",
)
def all_to_all_v(
    send: int | None,
    send_counts: int | None,
    send_offsets: int | None,
    send_number: int,
    receive: int | None,
    receive_counts: int | None,
    receive_offsets: int | None,
    receive_number: int,
    handle: int | None,
    stream: int | None,
    *,
    simulator: Simulator,
) -> Compute:
    """Rank r gets send_counts[r] elements at send_offsets[r]; what comes from r goes to receive_offsets[r]."""
    function = "HcclAlltoAllV"
    domain, dtype = _open(simulator, function, handle, send_number)
    if receive_number != send_number:
        raise HcclRefused(Result.PARAMETER, f"{function}: sendType and recvType must be equal.")
    counts, offsets = (_counts(function, address, domain.size) for address in (send_counts, send_offsets))
    sizes, places = (_counts(function, address, domain.size) for address in (receive_counts, receive_offsets))

    def compute() -> None:
        pieces = [_view(function, send, n, dtype, at) for n, at in zip(counts, offsets, strict=True)]
        found = domain.exchange(pieces, sizes, dtype)
        for n, at, piece in zip(sizes, places, found, strict=True):
            _view(function, receive, n, dtype, at).copy_(piece)

    return compute


@hccl("HcclAlltoAll", "pointer uint64 int32 pointer uint64 int32 pointer stream", source=f"{PAGES}HcclAlltoAll.md")
def all_to_all(
    send: int | None,
    send_count: int,
    send_number: int,
    receive: int | None,
    receive_count: int,
    receive_number: int,
    handle: int | None,
    stream: int | None,
    *,
    simulator: Simulator,
) -> Compute:
    """Rank r gets the r-th `send_count` elements of send."""
    domain, dtype = _open(simulator, "HcclAlltoAll", handle, send_number)
    if (receive_number, receive_count) != (send_number, send_count):
        raise HcclRefused(Result.PARAMETER, "HcclAlltoAll: what is sent and received must have one type and count.")
    source = _view("HcclAlltoAll", send, send_count * domain.size, dtype)
    target = _view("HcclAlltoAll", receive, send_count * domain.size, dtype)
    sizes = [send_count] * domain.size
    return lambda: _copy(
        target, torch.cat(domain.exchange(list(torch.ops.aten.split_with_sizes(source, sizes)), sizes, dtype))
    )


@hccl("HcclSend", "pointer uint64 int32 uint32 pointer stream", source=f"{PAGES}HcclSend.md")
def send(
    buffer: int | None,
    count: int,
    number: int,
    peer: int,
    handle: int | None,
    stream: int | None,
    *,
    simulator: Simulator,
) -> Compute:
    """Hand `count` elements to `peer`."""
    domain, dtype = _open(simulator, "HcclSend", handle, number)
    _peer("HcclSend", domain, peer)
    source = _view("HcclSend", buffer, count, dtype)
    return lambda: domain.send(source, peer)


@hccl("HcclRecv", "pointer uint64 int32 uint32 pointer stream", source=f"{PAGES}HcclRecv.md")
def receive(
    buffer: int | None,
    count: int,
    number: int,
    peer: int,
    handle: int | None,
    stream: int | None,
    *,
    simulator: Simulator,
) -> Compute:
    """Take `count` elements from `peer`."""
    domain, dtype = _open(simulator, "HcclRecv", handle, number)
    _peer("HcclRecv", domain, peer)
    target = _view("HcclRecv", buffer, count, dtype)
    return lambda: domain.receive(target, peer)


def _peer(function: str, domain: Domain, peer: int) -> None:
    if peer >= domain.size or peer == domain.rank:
        raise HcclRefused(Result.PARAMETER, f"{function}: peer {peer} of rank {domain.rank} in {domain.size} ranks.")


@dataclass(frozen=True)
class _Transfer:
    sends: bool
    buffer: torch.Tensor
    peer: int


_ITEM = struct.Struct("i4xQQiI")  # HcclSendRecvItem: kind, buffer, count, data type, peer
_SEND = 0  # HcclSendRecvType


@hccl("HcclBatchSendRecv", "pointer uint32 pointer stream", source=f"{PAGES}HcclBatchSendRecv.md")
def batch_send_receive(
    items: int | None, count: int, handle: int | None, stream: int | None, *, simulator: Simulator
) -> Compute:
    """Several transfers at once; the peers may list theirs in any order."""
    function = "HcclBatchSendRecv"
    if not items:
        raise HcclRefused(Result.POINTER, f"{function}: the items are a null pointer.")
    transfers: list[_Transfer] = []
    for kind, address, elements, number, peer in _ITEM.iter_unpack(ctypes.string_at(items, _ITEM.size * count)):
        domain, dtype = _open(simulator, function, handle, number)
        _peer(function, domain, peer)
        transfers.append(_Transfer(kind == _SEND, _view(function, address, elements, dtype), peer))
    domain = domains_of(simulator).get(function, handle)
    return lambda: domain.transfer([(one.sends, one.buffer, one.peer) for one in transfers])


@hccl("HcclBarrier", "pointer stream", source="Ascend/pytorch third_party/hccl/inc/hccl/hccl.h")
def barrier(handle: int | None, stream: int | None, *, simulator: Simulator) -> Compute:
    """Wait for every rank of the domain."""
    return domains_of(simulator).get("HcclBarrier", handle).barrier
