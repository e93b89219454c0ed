"""What the parts of a model have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import cast

import torch

from polyaccel.backend.communicator import Communicator
from polyaccel.backend.device import Device
from polyaccel.backend.plan import Plan, SiteRequest
from polyaccel.backend.rope import RopeTable
from polyaccel.backend.step import Step
from polyaccel.backend.weight import Weight, WeightSpec
from polyaccel.lora.target import AdapterTarget
from polyaccel.models.loading import Source, VectorSource
from polyaccel.models.shard import ModelShard

HiddenStates = tuple[torch.Tensor, torch.Tensor]
"""(normed, residual), each ``[T, hidden]``: what one block hands to the next."""


class Block(ABC):
    """A part of a model on one device: sites it calls, weights and vectors it holds, modules that take adapters.

    A block names every tensor it needs; the model reads them and hands them over with :meth:`attach`.
    """

    def __init__(self, shard: ModelShard, device: Device) -> None:
        self.shard = shard
        self.device = device

    @abstractmethod
    def requests(self) -> list[SiteRequest]:
        """The operators and stations it calls."""

    @abstractmethod
    def specs(self) -> list[WeightSpec]:
        """The weights it holds."""

    @abstractmethod
    def sources(self, names: Collection[str]) -> list[Source]:
        """Where the weights come from in a checkpoint with tensors of these names."""

    @abstractmethod
    def vectors(self) -> list[VectorSource]:
        """The vectors it holds, such as norms."""

    @abstractmethod
    def targets(self) -> list[AdapterTarget]:
        """The modules that take adapters."""

    @abstractmethod
    def attach(self, weights: Mapping[str, Weight], vectors: Mapping[str, torch.Tensor], rope: RopeTable) -> None:
        """Take what was loaded: weights by site, vectors by name, the device's rotary table."""

    @abstractmethod
    def bind(self, plan: Plan, comm: Communicator) -> None:
        """Take the planned sites and the group of ranks."""


class FeedForward(Block):
    """The second half of a decoder layer; ends with the norm that follows it."""

    @abstractmethod
    def forward(self, x: torch.Tensor, residual: torch.Tensor, step: Step) -> HiddenStates:
        """``x, residual: [T, hidden]``; returns both after this block and the next norm."""


def as_tensor(value: object) -> torch.Tensor:
    """The result of an operator that returns one tensor."""
    return cast(torch.Tensor, value)


def as_pair(value: object) -> HiddenStates:
    """The result of an operator that returns two tensors."""
    return cast(HiddenStates, value)
