"""Guarded buffers: an argument's memory with poison before, behind and between its elements."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

import torch

from polyaccel_conformance.harness.layouts import place
from polyaccel_conformance.operand import Operand

GUARD = 67
"""Poisoned elements on either side. Odd, so that no vector width divides what a flat kernel would see."""


class Poison(Enum):
    """What lies where nothing may be read. A result that differs between the two came from there."""

    NAN = "nan"
    LARGE = "large"


def poison_value(poison: Poison, dtype: torch.dtype) -> float | int:
    """The element that fills poisoned memory of a dtype."""
    if dtype.is_floating_point:
        return float("nan") if poison is Poison.NAN else float(torch.finfo(dtype).max) / 2
    if dtype is torch.bool:
        return poison is Poison.NAN
    # Indices of this size are outside of everything, but do not overflow when multiplied by a row length.
    return -(1 << 20) if poison is Poison.NAN and dtype is not torch.uint8 else 113


class Guarded:
    """One argument in a buffer of its own.

    ``tensor``: the argument, on the device. ``snapshot`` is kept to tell later what changed.
    """

    def __init__(
        self, operand: Operand, layout: str, poison: Poison, upload: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        values = operand.torch()
        where = place(values.shape, layout, GUARD)
        host = torch.full((where.span + GUARD,), poison_value(poison, values.dtype), dtype=values.dtype)
        inside = host.as_strided(values.shape, where.strides, where.offset)
        inside.copy_(values)
        self._buffer = upload(host)
        self.tensor = self._buffer.as_strided(values.shape, where.strides, where.offset)
        self._before = _bits(host)
        index = torch.arange(len(host)).as_strided(values.shape, where.strides, where.offset).reshape(-1)
        self._own = torch.zeros(len(host), dtype=torch.bool)
        self._own[index] = True

    def trespassed(self) -> int:
        """Elements outside of the argument that were written to."""
        return int(((_bits(self._buffer.cpu()) != self._before) & ~self._own).sum())

    def changed(self) -> int:
        """Elements of the argument whose bits are no longer what they were."""
        return int(((_bits(self._buffer.cpu()) != self._before) & self._own).sum())


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    views = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(views[tensor.element_size()]).clone()
