"""Wrong communicators, and wrong operators and weights of several ranks."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from polyaccel.backend import Backend, Communicator, Device, RankAddress, Weight, WeightSpec
from polyaccel.backend.errors import CommunicationError
from polyaccel_conformance.harness.overlay import Overlay
from polyaccel_conformance.mutants.choices import holding
from polyaccel_conformance.mutants.mutant import Altered, Function, Mutant, Wrap, changed

Tensor = torch.Tensor
AT_ONCE = 0.5
"""Seconds within which an error is about a failure, not about a rank that stays away."""


class Around(Communicator):
    """Another communicator, whose collectives subclasses spoil. The core traces this one."""

    def __init__(self, inner: Communicator) -> None:
        super().__init__()
        self.inner = inner
        self.rank, self.world_size, self.transport = inner.rank, inner.world_size, inner.transport

    def gather_objects(self, value: object) -> list[object]:
        return self.inner.gather_objects(value)

    def close(self) -> None:
        self.inner.close()

    def _all_reduce(self, x: Tensor) -> None:
        self.inner.all_reduce(x)

    def _all_gather(self, x: Tensor, dim: int) -> Tensor:
        return self.inner.all_gather(x, dim)

    def _reduce_scatter(self, x: Tensor) -> Tensor:
        return self.inner.reduce_scatter(x)

    def _all_to_all(self, x: Tensor, send_rows: list[int], receive_rows: list[int]) -> Tensor:
        return self.inner.all_to_all(x, send_rows, receive_rows)

    def _broadcast(self, x: Tensor, source: int) -> None:
        self.inner.broadcast(x, source)

    def _barrier(self) -> None:
        self.inner.barrier()


class _TimesWorld(Around):
    def _all_reduce(self, x: Tensor) -> None:
        x.mul_(self.world_size)


class _SkipsLast(Around):
    def _all_reduce(self, x: Tensor) -> None:
        if self.rank == self.world_size - 1:
            x.zero_()
        super()._all_reduce(x)


class _Narrow(Around):
    def _all_reduce(self, x: Tensor) -> None:
        half = x.bfloat16()
        super()._all_reduce(half)
        x.copy_(half)


class _OwnFirst(Around):
    def _all_reduce(self, x: Tensor) -> None:
        """Every rank adds up all parts by itself, from its own on."""
        parts = self.inner.all_gather(x.contiguous().view(1, -1), 0)
        total = parts[self.rank].clone()
        for step in range(1, self.world_size):
            total += parts[(self.rank + step) % self.world_size]
        x.copy_(total.view(x.shape))


class _NoBarrier(Around):
    def _barrier(self) -> None:
        return None


class _Previous(Around):
    last: Tensor | None = None

    def _all_reduce(self, x: Tensor) -> None:
        super()._all_reduce(x)
        result, last = x.clone(), self.last
        if last is not None and last.shape == x.shape and last.dtype == x.dtype:
            x.copy_(last)
        self.last = result


class _WrongRoot(Around):
    def _broadcast(self, x: Tensor, source: int) -> None:
        super()._broadcast(x, 0)


class _SilentTimeout(Around):
    """Swallows errors that come late."""

    late = True

    def _all_reduce(self, x: Tensor) -> None:
        began = time.monotonic()
        try:
            super()._all_reduce(x)
        except CommunicationError:
            if (time.monotonic() - began > AT_ONCE) is not self.late:
                raise


class _SilentFailure(_SilentTimeout):
    """Swallows errors that come at once."""

    late = False


class _Connected(Overlay):
    """A host whose communicators of several ranks are spoiled. ``spoil`` gets all of them, in the order of opening."""

    def __init__(self, inner: Backend, spoil: Callable[[Communicator], Communicator]) -> None:
        super().__init__(inner)
        self._spoil = spoil

    def connect(self, address: RankAddress) -> Communicator:
        comm = super().connect(address)
        return self._spoil(comm) if address.world_size > 1 else comm


def _kept_buffer() -> Callable[[Communicator], Communicator]:
    """A buffer that has just been summed is taken to be summed already."""
    last: list[Tensor] = []

    class Kept(Around):
        def _all_reduce(self, x: Tensor) -> None:
            if last and last[0] is x:
                return
            last[:] = [x]
            super()._all_reduce(x)

    return Kept


def _mixing() -> Callable[[Communicator], Communicator]:
    """The second communicator ends with what the first one had."""
    first: list[Communicator] = []
    kept: list[Tensor] = []

    class Mixed(Around):
        def _all_reduce(self, x: Tensor) -> None:
            super()._all_reduce(x)
            if self is first[0]:
                kept[:] = [x.clone()]
            elif kept and kept[0].shape == x.shape and kept[0].dtype == x.dtype:
                x.copy_(kept[0])

    def spoil(comm: Communicator) -> Communicator:
        found = Mixed(comm)
        if not first:
            first.append(found)
        return found

    return spoil


def _half_is_world() -> Callable[[Communicator], Communicator]:
    """A group of half of the ranks sums over all of them."""
    world: list[Communicator] = []

    class Half(Around):
        def _all_reduce(self, x: Tensor) -> None:
            world[0].all_reduce(x)

    def spoil(comm: Communicator) -> Communicator:
        if not world:
            world.append(comm)
        return Half(comm) if 2 * comm.world_size == world[0].world_size else comm

    return spoil


def _collective(
    name: str,
    what: str,
    check: str,
    spoil: Callable[[], Callable[[Communicator], Communicator]],
    *,
    operators: tuple[str, ...] = ("all_reduce",),
    devices: int = 2,
) -> Mutant:
    return Mutant(
        name=name,
        what=what,
        operators=operators,
        check=check,
        apply=lambda inner: _Connected(inner, spoil()),
        devices=devices,
    )


# -- stations ----------------------------------------------------------------------------------------------------------


def _bias_everywhere(fn: Function) -> Function:
    def row_parallel_linear(x: Tensor, weight: Weight, step: Any, comm: Communicator, reduce: bool = True) -> Tensor:
        y: Tensor = fn(x, weight, step, comm, reduce)
        bias = getattr(weight, "bias", None)
        return y + (comm.world_size - 1) * bias if reduce and bias is not None else y

    return row_parallel_linear


def _further_collective(fn: Function) -> Function:
    def row_parallel_linear(x: Tensor, weight: Weight, step: Any, comm: Communicator, reduce: bool = True) -> Tensor:
        y: Tensor = fn(x, weight, step, comm, reduce)
        if comm.world_size > 1 and reduce:
            comm.all_reduce(torch.zeros(8))
        return y

    return row_parallel_linear


def _hidden_copy(fn: Function) -> Function:
    def row_parallel_linear(x: Tensor, weight: Weight, step: Any, comm: Communicator, reduce: bool = True) -> Tensor:
        y: Tensor = fn(x.contiguous() if comm.world_size > 1 else x, weight, step, comm, reduce)
        return y

    return row_parallel_linear


def _station(name: str, what: str, check: str, wrap: Wrap) -> Mutant:
    return Mutant(
        name=name,
        what=what,
        operators=("row_parallel_linear",),
        check=check,
        apply=lambda inner: Altered(inner, {"row_parallel_linear": wrap}),
        devices=2,
    )


class _FullWeights(Overlay):
    """Keeps room for every rank's part."""

    world_size = 1

    def connect(self, address: RankAddress) -> Communicator:
        self.world_size = max(self.world_size, address.world_size)
        return super().connect(address)

    def allocate_weight(self, spec: WeightSpec, device: Device, tied: Weight | None = None) -> Weight:
        weight = super().allocate_weight(spec, device, tied)
        others = torch.zeros((self.world_size - 1, spec.n, spec.k), dtype=spec.dtype)
        own: Any = type(weight).nbytes
        return changed(weight, nbytes=property(lambda held: own.fget(held) + others.nbytes))  # type: ignore[no-any-return]


def _last_here(held: Tensor) -> Tensor:
    """The last local expert where one belongs to another rank."""
    return torch.where(held < 0, held.max().clamp(min=0), held)


RANKS: tuple[Mutant, ...] = (
    _collective("all_reduce.times_world", "W x is returned.", "comm.collectives", lambda: _TimesWorld),
    _collective(
        "all_reduce.skips_last_rank", "The last rank's part is missing.", "comm.collectives", lambda: _SkipsLast
    ),
    _collective("all_reduce.bf16", "Sums travel as bfloat16.", "comm.collectives", lambda: _Narrow),
    _collective(
        "all_reduce.own_order",
        "Each rank adds in an order of its own.",
        "comm.collectives",
        lambda: _OwnFirst,
        devices=3,
    ),
    _collective(
        "all_reduce.previous_result", "The previous call's result is returned.", "comm.back_to_back", lambda: _Previous
    ),
    _collective("all_reduce.kept_buffer", "A buffer is summed once, however often.", "comm.back_to_back", _kept_buffer),
    _collective(
        "all_reduce.mixes_communicators",
        "A second communicator gives the first one's result.",
        "comm.interleaved",
        _mixing,
    ),
    _collective(
        "all_reduce.wrong_subgroup",
        "A group of half of the ranks is all of them.",
        "comm.subgroups",
        _half_is_world,
        devices=4,
    ),
    _collective("all_reduce.silent_timeout", "A missing rank goes unnoticed.", "comm.timeout", lambda: _SilentTimeout),
    _collective(
        "all_reduce.silent_failure",
        "A failed rank goes unnoticed.",
        "comm.failure_on_one_rank",
        lambda: _SilentFailure,
    ),
    _collective(
        "barrier.no_op", "A barrier waits for nobody.", "comm.barrier", lambda: _NoBarrier, operators=("barrier",)
    ),
    _collective(
        "broadcast.from_rank_0",
        "Every broadcast comes from rank 0.",
        "comm.collectives",
        lambda: _WrongRoot,
        operators=("broadcast",),
    ),
    _station("row_parallel.bias_on_every_rank", "The bias is added once a rank.", "values.exact", _bias_everywhere),
    _station("row_parallel.further_collective", "One more collective is sent.", "comm.trace", _further_collective),
    _station(
        "row_parallel.hidden_copy",
        "With several ranks x is copied uncounted.",
        "comm.row_parallel_operands",
        _hidden_copy,
    ),
    Mutant(
        name="weights.full_on_every_rank",
        what="Every rank holds the whole weight.",
        operators=("row_parallel_linear",),
        check="comm.memory",
        apply=lambda inner: _FullWeights(inner),
        devices=2,
    ),
    Mutant(
        name="moe_experts.hole_is_last",
        what="Experts of other ranks are taken for the last one here.",
        operators=("moe_experts",),
        check="values.exact",
        apply=lambda inner: Altered(inner, {"moe_experts": holding(_last_here)}),
        devices=2,
    ),
)
