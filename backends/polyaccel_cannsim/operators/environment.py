"""What a rule may know besides its arguments: the chip, and the communicators of this process."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch

from ..soc import Chip
from .refusal import inner

CHIP_910B = Chip.A2.value  # Atlas A2 training, Atlas 800I A2
CHIP_A3 = Chip.A3.value
CHIP_310P = Chip.P310.value  # Atlas inference products: 300I Duo and others


class Communicator(Protocol):
    """A communication domain as the fused operators see it."""

    @property
    def name(self) -> str: ...

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over ranks of `x`, a float CPU tensor that is left alone."""
        ...

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Every rank's `x`, rank after rank along the first axis."""
        ...


class Communicators(Protocol):
    """The communicators that this process has created, by name."""

    def find(self, name: str) -> Communicator | None: ...


@dataclass
class Environment:
    """The simulated host of a call.

    `fused` is the one communicator that fused matmul + collective operators have used so far: on Atlas A2 "all MC2
    operators of one model must use the same communication domain" (aclnnMatmulAllReduce.md, constraints).
    """

    chip: str
    communicators: Communicators
    fused: str | None = field(default=None)

    def communicator(self, function: str, name: str | None) -> Communicator:
        """The communicator called `name`; refused where no rank of this process has made it (561000)."""
        found = self.communicators.find(name) if name else None
        if found is None:
            raise inner(f"{function}: no communicator named {name!r} in this process, HcclGetCommName gives the name.")
        return found

    def claim_fused(self, function: str, communicator: Communicator) -> None:
        """Note that a fused operator uses `communicator`; refuse a second one on Atlas A2 (561000)."""
        if self.chip != CHIP_910B:
            return
        if self.fused is not None and self.fused != communicator.name and self.communicators.find(self.fused):
            raise inner(
                f"{function}: all MC2 operators of one model must share one communicator; {self.fused} is in use, "
                f"{communicator.name} was given."
            )
        self.fused = communicator.name
