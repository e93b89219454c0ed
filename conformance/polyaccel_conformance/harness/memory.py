"""Guarded buffers: an argument's memory with poison before, behind and between its elements."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from types import MappingProxyType

import torch

from polyaccel_conformance.harness.layouts import place

GUARD = 67
"""Poisoned elements on either side. Odd, so that no vector width divides what a flat kernel would see."""


class Poison(Enum):
    """What lies where nothing may be read.

    ``ZERO`` is benign: faults of memory hardly show, so that what is wrong there is the arithmetic. A result that
    differs between two poisons came from where nothing may be read. ``LARGE`` is seen where comparisons drop a NaN.
    """

    ZERO = "zero"
    NAN = "nan"
    LARGE = "large"


# Quiet NaNs with payloads of their own, which no arithmetic makes: they tell memory that was never written from a NaN
# that was computed.
_NANS: Mapping[torch.dtype, int] = MappingProxyType(
    {torch.float32: 0x7FD5A5A5, torch.bfloat16: 0x7FD5, torch.float16: 0x7F5A}
)
_INTEGERS: Mapping[int, torch.dtype] = MappingProxyType(
    {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
)


def poison_pattern(poison: Poison, dtype: torch.dtype) -> int:
    """The bits of a poisoned element as a signed integer of its size (unsigned for one byte)."""
    return int(as_bits(poison_(torch.empty(1, dtype=dtype), poison)).item())


def poison_(tensor: torch.Tensor, poison: Poison) -> torch.Tensor:
    """Fill a tensor of any device with poison."""
    dtype = tensor.dtype
    if poison is Poison.ZERO:
        return tensor.zero_()
    if dtype in _NANS and poison is Poison.NAN:
        as_bits(tensor).fill_(_NANS[dtype])
        return tensor
    if dtype.is_floating_point or dtype.is_complex:
        return tensor.fill_(torch.nan if poison is Poison.NAN else torch.finfo(dtype).max / 2)
    if dtype is torch.bool:
        return tensor.fill_(poison is Poison.NAN)
    if dtype.itemsize == 1:
        return tensor.fill_(0x5A if poison is Poison.NAN else 113)
    # An index of this size is outside of everything, but does not overflow when multiplied by a row length.
    large = 113 if dtype.itemsize == 2 else 1 << 20
    return tensor.fill_(-large if poison is Poison.NAN else 113)


def as_bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as integers of the element's size; bool as bytes."""
    return tensor.view(_INTEGERS[tensor.element_size()])


class Guarded:
    """One argument in a buffer of its own.

    ``tensor``: the argument, on the device, in a named layout of :mod:`layouts`. The host's copy is kept to tell later
    what changed.
    """

    def __init__(
        self, values: torch.Tensor, layout: str, poison: Poison, upload: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        where = place(values.shape, layout, GUARD)
        host = poison_(torch.empty(where.span + GUARD, dtype=values.dtype), poison)
        self._where = (tuple(values.shape), where.strides, where.offset)
        host_view = host.as_strided(*self._where)
        if 0 in where.strides:
            once = _once(where.strides)
            host_view, values = host_view[once], values[once]
        host_view.copy_(values)
        self._host = host
        self._buffer = upload(host)
        self.tensor = self._buffer.as_strided(*self._where)

    @property
    def storage(self) -> int:
        """Address of the buffer, which says whose memory another tensor is."""
        return self._buffer.untyped_storage().data_ptr()

    def differences(self) -> tuple[int, int]:
        """Elements outside of the argument that were written to, and elements of it whose bits changed."""
        after, before = as_bits(self._buffer.cpu()), as_bits(self._host)
        if torch.equal(after, before):
            return 0, 0
        different = after != before
        total = int(torch.count_nonzero(different))
        own = torch.zeros(len(self._host), dtype=torch.bool)
        own.as_strided(*self._where)[_once(self._where[1])].fill_(True)
        inside = int(torch.count_nonzero(different & own))
        return total - inside, inside


def _once(strides: Sequence[int]) -> tuple[slice, ...]:
    """Of dimensions whose elements share their memory the first: it is written once."""
    return tuple(slice(1) if stride == 0 else slice(None) for stride in strides)
