"""Backends whose ranks lose bits in their sums: each is found by its name in this file."""

from __future__ import annotations

import torch

from polyaccel.backend import Backend, Communicator, RankAddress, TableBackend
from polyaccel.backend.composite.communicator import TorchCommunicator

EIGHT_BITS = torch.float8_e4m3fn


class _Sent(TorchCommunicator):
    """Sends eight-bit numbers."""

    def _all_reduce(self, x: torch.Tensor) -> None:
        x.copy_(x.to(EIGHT_BITS).to(x.dtype))
        super()._all_reduce(x)


class _Kept(TorchCommunicator):
    """Keeps four bits of every partial sum."""

    def _all_reduce(self, x: torch.Tensor) -> None:
        parts = torch.stack([x.clone() for _ in range(self.world_size)])
        for rank in range(self.world_size):
            self.broadcast(parts[rank], rank)
        total = parts[0]
        for part in parts[1:]:
            fraction, exponent = torch.frexp((total + part).float())
            total = torch.ldexp(torch.round(fraction * 16) / 16, exponent).to(x.dtype)
        x.copy_(total)


class _Rough(TableBackend):
    def __init__(self, kind: type[TorchCommunicator]) -> None:
        super().__init__("cpu", {}, name="rough")
        self._kind = kind

    def connect(self, address: RankAddress) -> Communicator:
        if address.world_size == 1:
            return super().connect(address)
        right = super().connect(address)
        assert isinstance(right, TorchCommunicator)
        right.__class__ = self._kind
        return right


def sent() -> Backend:
    return _Rough(_Sent)


def kept() -> Backend:
    return _Rough(_Kept)
