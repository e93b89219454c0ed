"""Host tensors in an aclTensor's place, ranks in one process, and float64 references, for tests of single rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Barrier
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from polyaccel_cannsim.operators import OPERATORS
from polyaccel_cannsim.operators.environment import CHIP_910B, Environment
from polyaccel_cannsim.operators.operator import Launch, Operator
from polyaccel_cannsim.operators.refusal import Refusal

TABLE: dict[str, Operator] = {row.name: row for row in OPERATORS}
HALVES = (torch.float16, torch.bfloat16)
FLOATS = (*HALVES, torch.float32)
Array = npt.NDArray[np.float64]


@dataclass
class Host:
    """A torch tensor described as CANN describes one. `format` 2 is ND."""

    tensor: torch.Tensor
    format: int = 2

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def stride(self) -> tuple[int, ...]:
        return tuple(self.tensor.stride())

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def view(self) -> torch.Tensor:
        return self.tensor


class Alone:
    """A communicator of one rank."""

    name, rank, size = "alone", 0, 1

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return x


@dataclass
class Threads:
    """A communicator over threads of this process: one object a rank, `slots` and `meet` shared."""

    rank: int
    size: int
    slots: list[Any]
    meet: Barrier
    name: str = "threads"

    def _all(self, x: torch.Tensor) -> list[torch.Tensor]:
        self.slots[self.rank] = x
        self.meet.wait(30)
        found = list(self.slots)
        self.meet.wait(30)
        return found

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._all(x)).sum(0)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat(self._all(x))


@dataclass
class Sized:
    """A communicator whose collectives must not be reached."""

    size: int
    rank: int = 0
    name: str = "sized"

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the call should have been refused")

    all_gather = all_reduce


@dataclass
class Book:
    """Communicators by name."""

    known: dict[str, Any] = field(default_factory=dict)

    def find(self, name: str) -> Any:
        return self.known.get(name)


def environment(*communicators: Any, chip: str = CHIP_910B) -> Environment:
    """An environment with these communicators (by their names), or one of a single rank."""
    chosen = communicators or (Alone(),)
    return Environment(chip, Book({one.name: one for one in chosen}))


def run(name: str, *arguments: Any, env: Environment | None = None) -> None:
    """Check and compute one call; tensors are wrapped as they are."""
    launch = TABLE[name](env or environment(), *(_wrap(one) for one in arguments))
    if isinstance(launch, Launch):
        launch.check()
        launch = launch.compute
    launch()


def check(name: str, *arguments: Any, env: Environment | None = None) -> Any:
    """Only the first stage."""
    return TABLE[name](env or environment(), *(_wrap(one) for one in arguments))


def refused(code: int, words: str, name: str, *arguments: Any, env: Environment | None = None) -> None:
    """Assert that the first stage refuses the call with this code and these words."""
    with pytest.raises(Refusal, match=words) as caught:
        check(name, *arguments, env=env)
    assert caught.value.code == code


def _wrap(one: Any) -> Any:
    if isinstance(one, torch.Tensor):
        return Host(one)
    if isinstance(one, tuple) and one and all(isinstance(member, torch.Tensor) for member in one):
        return tuple(Host(member) for member in one)
    return one


def on_ranks(size: int, work: Callable[[Threads], Any]) -> list[Any]:
    """Run `work` once a rank, in threads; returns the results in order."""
    slots: list[Any] = [None] * size
    meet = Barrier(size)
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda rank: work(Threads(rank, size, slots, meet)), range(size)))


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    """Normal values of a seed."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def exact(x: torch.Tensor) -> Array:
    """The values as float64."""
    return x.to(torch.float64).numpy()


def close(found: torch.Tensor, wanted: Array, magnitude: Array | float, terms: int = 1) -> None:
    """Assert one rounding to found's type plus float32 accumulation of `terms` products of summed size `magnitude`."""
    bits = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}[found.dtype]
    bound = np.abs(wanted) * bits * 1.01 + np.asarray(magnitude) * (terms + 8) * 2.0**-23 + 2.0**-24
    excess = np.abs(exact(found) - wanted) - bound
    assert found.shape == wanted.shape
    assert np.all(excess <= 0), f"off by {excess.max()} more than allowed"


def shuffled(x: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
    """The same values with axes stored in another order: a strided tensor."""
    back = [list(order).index(axis) for axis in range(x.ndim)]
    return x.permute(list(order)).contiguous().permute(back)
