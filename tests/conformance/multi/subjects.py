"""Backends that the ranks of these tests open, right and wrong ones: each is found by its name in this file."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from polyaccel.backend import Backend, Communicator, Device, RankAddress, TableBackend, Weight, WeightSpec
from polyaccel.backend.composite.communicator import TorchCommunicator
from polyaccel.backend.composite.linear import linear
from polyaccel.backend.composite.lora import sgmv
from polyaccel.backend.composite.weight import TensorWeight
from polyaccel.backend.errors import BackendUnavailable, CommunicationError
from polyaccel.backend.step import Step
from polyaccel_conformance.subject import Subject
from tests.backends.folded.backend import FoldedBackend

Wrap = Callable[[RankAddress], Communicator]
HERE = Path(__file__)


def subject(name: str) -> Subject:
    """``cpu``, or a function of this file."""
    return Subject() if name == "cpu" else Subject(kind="table", name=name, path=str(HERE))


class Composites(TableBackend):
    """Plain torch; ``connected`` may put something wrong in place of the communicator."""

    def __init__(
        self, connected: Wrap | None = None, operators: dict[str, Callable[..., object]] | None = None
    ) -> None:
        super().__init__("cpu", operators or {}, name="composites")
        self._connected = connected

    def connect(self, address: RankAddress) -> Communicator:
        if self._connected is not None and address.world_size > 1:
            return self._connected(address)
        return super().connect(address)


def composites() -> Backend:
    return Composites()


def folded() -> Backend:
    return FoldedBackend()


# -- wrong communicators -----------------------------------------------------------------------------------------------


class TimesWorld(TorchCommunicator):
    def _all_reduce(self, x: torch.Tensor) -> None:
        x.mul_(self.world_size)


class SkipsLast(TorchCommunicator):
    def _all_reduce(self, x: torch.Tensor) -> None:
        if self.rank == self.world_size - 1:
            x.zero_()
        super()._all_reduce(x)


class NoBarrier(TorchCommunicator):
    def _barrier(self) -> None:
        return None


class Previous(TorchCommunicator):
    def __init__(self, address: RankAddress) -> None:
        super().__init__(address)
        self._last: torch.Tensor | None = None

    def _all_reduce(self, x: torch.Tensor) -> None:
        super()._all_reduce(x)
        result = x.clone()
        if self._last is not None and self._last.shape == x.shape and self._last.dtype == x.dtype:
            x.copy_(self._last)
        self._last = result


class Narrow(TorchCommunicator):
    def _all_reduce(self, x: torch.Tensor) -> None:
        half = x.bfloat16()
        super()._all_reduce(half)
        x.copy_(half)


class Differing(TorchCommunicator):
    """The last bit of the last element is another one on the last rank."""

    def _all_reduce(self, x: torch.Tensor) -> None:
        super()._all_reduce(x)
        if self.rank == self.world_size - 1 and x.numel():
            last = x.view(-1)[-1:]
            last.copy_(torch.nextafter(last.float(), torch.tensor(torch.inf)).to(x.dtype))


class SilentTimeout(TorchCommunicator):
    """Swallows errors that come late."""

    late = True

    def _all_reduce(self, x: torch.Tensor) -> None:
        begun = time.monotonic()
        try:
            super()._all_reduce(x)
        except CommunicationError:
            if (time.monotonic() - begun > self._timeout / 2) is not self.late:
                raise


class SilentFailure(SilentTimeout):
    """Swallows errors that come at once."""

    late = False


class Mixing:
    """The second communicator ends with what the first one had."""

    def __init__(self) -> None:
        self.first: TorchCommunicator | None = None
        self.kept: torch.Tensor | None = None

    def __call__(self, address: RankAddress) -> Communicator:
        mixing = self

        class Mixed(TorchCommunicator):
            def _all_reduce(self, x: torch.Tensor) -> None:
                super()._all_reduce(x)
                if self is mixing.first:
                    mixing.kept = x.clone()
                elif mixing.kept is not None and mixing.kept.shape == x.shape:
                    x.copy_(mixing.kept)

        found = Mixed(address)
        self.first = self.first or found
        return found


class WrongGroup:
    """Groups of some ranks are the world."""

    def __init__(self) -> None:
        self.world: TorchCommunicator | None = None

    def __call__(self, address: RankAddress) -> Communicator:
        found = TorchCommunicator(address)
        if self.world is None:
            self.world = found
        elif address.world_size < self.world.world_size:
            found._groups[:] = self.world._groups
        return found


def times_world() -> Backend:
    return Composites(TimesWorld)


def skips_last() -> Backend:
    return Composites(SkipsLast)


def no_barrier() -> Backend:
    return Composites(NoBarrier)


def previous() -> Backend:
    return Composites(Previous)


def narrow() -> Backend:
    return Composites(Narrow)


def differing() -> Backend:
    return Composites(Differing)


def silent_timeout() -> Backend:
    return Composites(SilentTimeout)


def silent_failure() -> Backend:
    return Composites(SilentFailure)


def mixing() -> Backend:
    return Composites(Mixing())


def wrong_group() -> Backend:
    return Composites(WrongGroup())


# -- wrong stations and weights ----------------------------------------------------------------------------------------


def _station(
    wrong: Callable[[torch.Tensor, torch.Tensor, Weight, Communicator], torch.Tensor],
) -> dict[str, Callable[..., object]]:
    """``row_parallel_linear`` where ``wrong(y before adapters, delta, weight, comm)`` is what is summed."""

    def row_parallel_linear(
        x: torch.Tensor, weight: Weight, step: Step, comm: Communicator, reduce: bool = True
    ) -> torch.Tensor:
        y = linear(x, weight)
        delta = sgmv(torch.zeros_like(y), x, weight, step)
        y = wrong(y, delta, weight, comm)
        return comm.all_reduce(y) if reduce and comm.world_size > 1 else y

    return {"row_parallel_linear": row_parallel_linear}


def bias_everywhere() -> Backend:
    def wrong(y: torch.Tensor, delta: torch.Tensor, weight: Weight, comm: Communicator) -> torch.Tensor:
        assert isinstance(weight, TensorWeight)
        return y + delta if weight.bias is None else y + delta + (comm.world_size - 1) * weight.bias

    return Composites(operators=_station(wrong))


def full_delta() -> Backend:
    def wrong(y: torch.Tensor, delta: torch.Tensor, weight: Weight, comm: Communicator) -> torch.Tensor:
        return y + delta * comm.world_size

    return Composites(operators=_station(wrong))


def further_collective() -> Backend:
    def wrong(y: torch.Tensor, delta: torch.Tensor, weight: Weight, comm: Communicator) -> torch.Tensor:
        # Right values at the price of a collective for the adapters.
        return y + comm.all_reduce(delta.clone()) / comm.world_size if comm.world_size > 1 else y + delta

    return Composites(operators=_station(wrong))


def hidden_copy() -> Backend:
    def row_parallel_linear(
        x: torch.Tensor, weight: Weight, step: Step, comm: Communicator, reduce: bool = True
    ) -> torch.Tensor:
        y = sgmv(linear(x.contiguous(), weight), x, weight, step)
        return comm.all_reduce(y) if reduce and comm.world_size > 1 else y

    return Composites(operators={"row_parallel_linear": row_parallel_linear})


class FullWeight(TensorWeight):
    """Keeps room for every rank's part."""

    def __init__(self, spec: WeightSpec, device: Device, tied: Weight | None, world_size: int) -> None:
        super().__init__(spec, device, tied)
        self._others = torch.zeros((world_size - 1, spec.n, spec.k), dtype=spec.dtype)

    @property
    def nbytes(self) -> int:
        return super().nbytes + self._others.numel() * self._others.element_size()


class FullWeights(Composites):
    world_size = 1

    def connect(self, address: RankAddress) -> Communicator:
        self.world_size = address.world_size
        return super().connect(address)

    def allocate_weight(self, spec: WeightSpec, device: Device, tied: Weight | None = None) -> Weight:
        return FullWeight(spec, device, tied, self.world_size)


def full_weights() -> Backend:
    return FullWeights()


def padded_scale() -> Backend:
    """The engine, not the backend, is wrong: the scale comes from a rank that was padded to a multiple of the ranks."""
    from polyaccel.lora import numbers

    right = numbers.RankNumbers.of

    def of(*, alpha: float, true_rank: int, use_rslora: bool = False) -> numbers.RankNumbers:
        found = right(alpha=alpha, true_rank=true_rank, use_rslora=use_rslora)
        padded = -(-true_rank // 8) * 8
        return numbers.RankNumbers(
            alpha=found.alpha,
            true_rank=true_rank,
            padded_rank=padded,
            shard_rank=padded,
            scale=alpha / padded,
        )

    numbers.RankNumbers.of = staticmethod(of)  # type: ignore[method-assign, assignment]
    return Composites()


# -- ranks that go wrong altogether ------------------------------------------------------------------------------------


class Dies(TorchCommunicator):
    def _all_reduce(self, x: torch.Tensor) -> None:
        if self.rank == 1:
            os._exit(7)
        super()._all_reduce(x)


class Hangs(TorchCommunicator):
    def _all_reduce(self, x: torch.Tensor) -> None:
        if self.rank == 1:
            time.sleep(600)
        super()._all_reduce(x)


class Fails(TorchCommunicator):
    def _all_reduce(self, x: torch.Tensor) -> None:
        if self.rank == 1:
            raise ValueError("something of the plugin's own")
        super()._all_reduce(x)


def dies() -> Backend:
    return Composites(Dies)


def hangs() -> Backend:
    return Composites(Hangs)


def fails() -> Backend:
    return Composites(Fails)


def unusable() -> Backend:
    raise BackendUnavailable("no such hardware here")


def no_fork() -> Backend:
    backend = Composites()
    backend.fork_safe = False
    return backend
