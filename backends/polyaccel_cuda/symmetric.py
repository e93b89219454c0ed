"""Sums over ranks through memory that the ranks' GPUs read from one another, without multicast."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import MappingProxyType
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d as c10d

from polyaccel.backend import Reason
from polyaccel_cuda.nccl import NcclGroup, settings

MOST_RANKS = 8
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NO_MULTICAST: Mapping[str, str] = MappingProxyType({"TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"})
"""A multicast object takes a host-wide resource, and nothing here would use it."""

Gather = Callable[[object], list[object]]
"""Every rank's value, in rank order."""


class NumberedStore(c10d.Store):
    """A store whose keys ``name/number/rank`` count from 0 in this store.

    torch numbers its exchanges of addresses over a whole process. Ranks that have been in different groups before
    would count differently and wait for each other's keys in vain. Nothing is waited for longer than ``timeout``.
    """

    def __init__(self, inner: c10d.Store, timeout: timedelta) -> None:
        super().__init__()
        self._inner, self._limit = inner, timeout
        self._numbers: dict[tuple[str, str], int] = {}

    def set(self, key: str, value: Any) -> None:
        self._inner.set(self._own(key), value)

    def get(self, key: str) -> bytes:
        self.wait([key])
        return bytes(self._inner.get(self._own(key)))

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        self._inner.wait([self._own(key) for key in keys], self._limit if timeout is None else timeout)

    def check(self, keys: Sequence[str]) -> bool:
        return bool(self._inner.check([self._own(key) for key in keys]))

    def _own(self, key: str) -> str:
        name, _, rest = key.partition("/")
        number, _, rank = rest.partition("/")
        if not number.isdigit():
            return key
        same = [known for known in self._numbers if known[0] == name]
        return f"{name}/{self._numbers.setdefault((name, number), len(same))}/{rank}"


PAGE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Places:
    """Where each kernel's part of a rank's buffer begins, in bytes; the first is one-shot's.

    Attributes:
        pushed: None where there are not two ranks.
    """

    reduce_norm: int
    two_shot: int
    pushed: int | None
    total: int


def places(world_size: int) -> Places:
    """The same on all ranks."""
    from polyaccel_cuda.kernels import one_shot, pushed, reduce_norm, two_shot

    def page(count: int) -> int:
        return -(-count // PAGE_BYTES) * PAGE_BYTES

    norm = page(one_shot.BUFFER_BYTES)
    two = norm + page(reduce_norm.BUFFER_BYTES)
    end = two + page(two_shot.buffer_bytes(world_size))
    if world_size != 2:
        return Places(norm, two, None, end)
    return Places(norm, two, end, end + page(pushed.BUFFER_BYTES))


class OneShot:
    """Sums of one group by kernels of our own: a buffer of each rank, mapped into all of them.

    Small ones are one-shot (:meth:`all_reduce`), medium ones two-shot, and what is to be summed beside other work is
    pushed by a copy engine (:meth:`push`, :meth:`meet`, :meth:`add_received`, two ranks).

    torch's own one-shot operator is not used: it takes no float16, sums in another order on each rank unless there are
    2, 4 or 8 of them, and waits for ever for a rank that does not come. The numbers are copied into the buffer by the
    kernel that sums them, so a product need not be written there first.

    Attributes:
        peers: address of each rank's buffer in this process.
    """

    def __init__(self, group: str, kept: object, handle: Any, buffer: torch.Tensor, rank: int, world_size: int) -> None:
        from polyaccel_cuda.kernels import one_shot, reduce_norm, two_shot

        self._group, self._rank = group, rank
        # A store written in Python is called by torch as long as its Python half lives.
        self._kept, self._handle, self._buffer = kept, handle, buffer
        shape = (buffer.numel(),)
        views = [handle.get_buffer(peer, shape, torch.uint8) for peer in range(world_size)]
        self.peers = tuple(buffer.data_ptr() if r == rank else view.data_ptr() for r, view in enumerate(views))
        self._places = places(world_size)

        def rounds(programs: int) -> torch.Tensor:
            return torch.zeros(programs, dtype=torch.int64, device=buffer.device)

        self._rounds, self._meetings = rounds(one_shot.PROGRAMS), rounds(1)
        self._norm_rounds, self._two_shot_rounds = rounds(reduce_norm.MOST_ROWS), rounds(two_shot.PROGRAMS)
        self._given_up = torch.zeros(1, dtype=torch.int32, pin_memory=buffer.device.type == "cuda")
        # The other rank's buffer, where copies are pushed to.
        self._other = views[1 - rank] if world_size == 2 else None

    def takes(self, x: torch.Tensor) -> bool:
        """Whether x is of a dtype and size that the kernel sums."""
        from polyaccel_cuda.kernels.one_shot import MOST_BYTES

        return x.dtype in DTYPES and 0 < x.numel() * x.element_size() <= MOST_BYTES

    def all_reduce(self, x: torch.Tensor) -> None:
        """Sum in place. Asynchronous on the current stream; may be captured."""
        from polyaccel_cuda.kernels.one_shot import one_shot_all_reduce

        one_shot_all_reduce(x, self._rank, self.peers, self._rounds, self._given_up)

    @property
    def two_shot_bytes(self) -> int:
        """Of the largest message that :meth:`two_shot` sums."""
        from polyaccel_cuda.kernels import two_shot

        return two_shot.MOST_BYTES

    def two_shot(self, x: torch.Tensor, programs: int | None = None) -> None:
        """Sum in place a dense x of at most :attr:`two_shot_bytes`, less where there are few programs."""
        from polyaccel_cuda.kernels import two_shot

        most = two_shot.PROGRAMS if programs is None else programs
        rounds, base = self._two_shot_rounds, self._places.two_shot
        two_shot.two_shot_all_reduce(x, self._rank, self.peers, base, rounds, self._given_up, most)

    def takes_norm(self, x: torch.Tensor, n: int) -> bool:
        """Whether :meth:`reduce_add_norm` sums x."""
        from polyaccel_cuda.kernels import reduce_norm

        return x.dtype in DTYPES and reduce_norm.takes(x, n)

    def reduce_add_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``(normed, total)`` of x summed over ranks and a residual, in one kernel."""
        from polyaccel_cuda.kernels import reduce_norm

        base, rounds = self._places.reduce_norm, self._norm_rounds
        return reduce_norm.reduce_add_norm(
            x, residual, weight, eps, self._rank, self.peers, base, rounds, self._given_up
        )

    # -- two ranks: a sum beside other work ----------------------------------------------------------------------------

    @property
    def pushes(self) -> bool:
        return self._other is not None

    def push(self, x: torch.Tensor, slot: int) -> None:
        """Copy a dense x of at most ``pushed.SLOT_BYTES`` into one of the other rank's two slots.

        It must have left the slot: slots are taken in turn, each followed by :meth:`meet` and :meth:`add_received` in
        one order, on all ranks; then whoever returns from a meeting knows that the other has added what came before.
        """
        assert self._other is not None
        _slot(self._other, self._places, slot, x).copy_(x.view(-1))

    def meet(self) -> None:
        """Wait, on the stream, until the other rank's stream is here too: what it has pushed has come."""
        from polyaccel_cuda.kernels import pushed

        assert self._places.pushed is not None
        pushed.meet(self._rank, self.peers, self._places.pushed, self._meetings, self._given_up)

    def add_received(self, x: torch.Tensor, slot: int) -> None:
        """Add what the other rank has pushed into this rank's slot."""
        from polyaccel_cuda.kernels import pushed

        pushed.add_received(x, _slot(self._buffer, self._places, slot, x))

    def abort(self) -> None:
        """Make kernels that wait for a peer return. From any thread."""
        self._given_up.fill_(1)

    def close(self) -> None:
        """Free the buffer, once no rank's kernel reads it any more."""
        c10d._unregister_process_group(self._group)  # type: ignore[attr-defined, arg-type, unused-ignore]
        del self._handle, self._buffer, self._kept, self._other


def _slot(buffer: torch.Tensor, where: Places, slot: int, like: torch.Tensor) -> torch.Tensor:
    """Elements of a slot of a rank's buffer, as many as ``like`` has and of its dtype."""
    from polyaccel_cuda.kernels import pushed

    assert where.pushed is not None
    nbytes = like.numel() * like.element_size()
    assert slot in (0, 1)
    assert nbytes <= pushed.SLOT_BYTES
    start = where.pushed + pushed.FLAG_BYTES + slot * pushed.SLOT_BYTES
    return buffer[start : start + nbytes].view(like.dtype)


def open_one_shot(
    store: c10d.Store, nccl: NcclGroup, rank: int, world_size: int, gather: Gather, timeout: float
) -> OneShot | Reason:
    """Map the ranks' buffers into one another; the same kind of answer on all ranks.

    Called by all ranks together. Symmetric memory is a private interface of torch: whatever it raises is a reason for
    doing without, which :class:`CudaCommunicator` reports.
    """
    refusal, buffer = _prepared(nccl.device, world_size)
    name, *_ = gather(f"polyaccel-{uuid4().hex}")
    if found := _first(gather(refusal)):
        return found
    assert buffer is not None
    opened: OneShot | None = None
    try:
        with settings(NO_MULTICAST):
            opened = _mapped(str(name), store, nccl, rank, world_size, buffer, timeout)
    except Exception as error:
        refusal = f"rank {rank}: {_words(error)}"
    if found := _first(gather(refusal)):
        if opened is not None:
            opened.close()
        return found
    assert opened is not None
    return opened


def _prepared(device: torch.device, world_size: int) -> tuple[Reason, torch.Tensor | None]:
    if world_size > MOST_RANKS:
        return f"{world_size} ranks, at most {MOST_RANKS} sum through symmetric memory", None
    try:
        size = places(world_size).total
        with settings(NO_MULTICAST), torch.cuda.device(device):
            buffer = c10d._SymmetricMemory.empty_strided_p2p((size,), (1,), torch.uint8, device)
            buffer.zero_()
            torch.cuda.synchronize(device)
    except Exception as error:
        return _words(error), None
    return "", buffer


def _mapped(
    name: str, store: c10d.Store, nccl: NcclGroup, rank: int, world_size: int, buffer: torch.Tensor, timeout: float
) -> OneShot:
    numbered = NumberedStore(store, timedelta(seconds=timeout))
    group: Any = dist.ProcessGroup(numbered, rank, world_size)
    kind = dist.ProcessGroup.BackendType.NCCL
    group._set_default_backend(kind)
    group._register_backend(torch.device("cuda"), kind, nccl.backend)
    group._set_group_name(name)
    registry: Any = c10d
    registry._register_process_group(name, group)
    try:
        registry._SymmetricMemory.set_group_info(name, rank, world_size, numbered)
        with torch.cuda.device(nccl.device):
            handle = registry._SymmetricMemory.rendezvous(buffer, name)
            return OneShot(name, (group, numbered), handle, buffer, rank, world_size)
    except BaseException:
        registry._unregister_process_group(name)
        raise


def _first(reasons: Sequence[object]) -> Reason:
    return next((str(reason) for reason in reasons if reason), "")


def _words(error: Exception) -> str:
    return f"symmetric memory: {type(error).__name__}: {str(error).partition(chr(10))[0]:.300}"
