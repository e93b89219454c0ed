"""A weight as plain tensors: row-major matrices, or the canonical quantised form packed two 4-bit codes a byte."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import torch

from polyaccel.backend.device import Device
from polyaccel.backend.errors import ConfigurationError, OperatorError
from polyaccel.backend.weight import Quantisation, Weight, WeightSpec, check_write


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantisedTensors:
    """The canonical form on the device; every tensor has a leading ``experts`` dimension where the weight has.

    ``codes: [n, bytes of k]`` uint8; with 4 bits, byte ``i`` holds column ``2 i`` in its low and ``2 i + 1`` in its
    high half, with other widths one column. ``zeros: [n, groups]`` uint8, ``scales: [n, groups]`` of the scale dtype.
    """

    codes: torch.Tensor
    zeros: torch.Tensor
    scales: torch.Tensor

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.codes, self.zeros, self.scales))

    def select(self, experts: torch.Tensor) -> QuantisedTensors:
        """Copies of the given ``experts: [m]`` (int64 on the device)."""
        return QuantisedTensors(
            codes=self.codes.index_select(0, experts),
            zeros=self.zeros.index_select(0, experts),
            scales=self.scales.index_select(0, experts),
        )


class TensorWeight(Weight):
    """Storage for any torch device. Elements never written are zero.

    Attributes:
        bias: ``[n]`` (``[experts, n]``) of the weight's dtype, or None.
        quantised: the packed form of a quantised weight, or None.

    Raises:
        ConfigurationError: a quantisation that has no packed form.
        OperatorError: ``tied`` is not a TensorWeight of the same shape, dtype and quantisation.
    """

    def __init__(self, spec: WeightSpec, device: Device, tied: Weight | None = None) -> None:
        self.spec = spec
        self.bias: torch.Tensor | None = None
        self.quantised: QuantisedTensors | None = None
        self._device = device
        self.torch_device = device.torch_device
        self._sealed = False
        self._tied_to: str | None = None
        self._tensor: torch.Tensor | None = None
        lead = () if spec.experts is None else (spec.experts,)
        with device.scope():
            if spec.bias:
                self.bias = device.zeros((*lead, spec.n), spec.dtype)
            if tied is not None:
                self._share(tied)
            elif spec.quantisation is None:
                self._tensor = self._storage((*lead, spec.n, spec.k))
            else:
                self.quantised = _allocate_quantised(spec, spec.quantisation, lead, device)

    @property
    def tensor(self) -> torch.Tensor:
        """``[n, k]`` (``[experts, n, k]``) of the weight's dtype: the storage itself.

        Raises:
            OperatorError: the weight is quantised.
        """
        if self._tensor is None:
            self._refuse("is quantised and has no plain tensor; use dequantize")
        return self._tensor

    def _storage(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Zeros for a plain weight; subclasses may place them inside a larger tensor."""
        return self._device.zeros(shape, self.spec.dtype)

    def part(self, slice_index: int) -> torch.Tensor:
        """The rows of one slice: a view ``[n of the slice, k]`` (``[experts, ...]``)."""
        starts = self.spec.starts
        return self.tensor[..., starts[slice_index] : starts[slice_index + 1], :]

    # -- writing -----------------------------------------------------------------------------------------------------

    def write(
        self,
        slice_index: int,
        source: torch.Tensor,
        *,
        row: int = 0,
        col: int = 0,
        expert: int | None = None,
    ) -> None:
        check_write(self.spec, slice_index, source.shape, row, col, expert)
        self._check_writable()
        if self.quantised is not None:
            self._refuse("is quantised; use write_quantised")
        rows, cols = source.shape
        destination = self._block(self.tensor, slice_index, row, rows, expert)[:, col : col + cols]
        with self._device.scope():
            destination.copy_(source)

    def write_bias(self, slice_index: int, source: torch.Tensor, *, row: int = 0, expert: int | None = None) -> None:
        if source.dim() != 1:
            self._refuse(f"bias source has {source.dim()} dimensions, expected 1")
        check_write(self.spec, slice_index, (source.shape[0], 0), row, 0, expert)
        self._check_open()
        if self.bias is None:
            self._refuse("was allocated without a bias")
        with self._device.scope():
            self._block(self.bias, slice_index, row, source.shape[0], expert).copy_(source)

    def write_quantised(
        self,
        slice_index: int,
        codes: torch.Tensor,
        zeros: torch.Tensor,
        scales: torch.Tensor,
        *,
        row: int = 0,
        col: int = 0,
        expert: int | None = None,
    ) -> None:
        check_write(self.spec, slice_index, codes.shape, row, col, expert)
        self._check_writable()
        stored, quantisation = self.quantised, self.spec.quantisation
        if stored is None or quantisation is None:
            self._refuse("is not quantised; use write")
        rows, cols = codes.shape
        self._check_canonical(quantisation, codes, zeros, scales, col)
        first, groups = col // quantisation.group_size, quantisation.groups(cols)
        packed = pack_codes(codes, quantisation.bits)
        first_byte = col // _codes_per_byte(quantisation.bits)
        with self._device.scope():
            block = self._block(stored.codes, slice_index, row, rows, expert)
            block[:, first_byte : first_byte + packed.shape[1]].copy_(packed)
            for destination, source in ((stored.zeros, zeros), (stored.scales, scales)):
                self._block(destination, slice_index, row, rows, expert)[:, first : first + groups].copy_(source)

    def seal(self) -> None:
        self._sealed = True

    def reopen(self) -> None:
        self._sealed = False

    @property
    def nbytes(self) -> int:
        """Bytes held by this weight itself: storage shared with a tied weight counts there."""
        held = 0 if self.bias is None else self.bias.numel() * self.bias.element_size()
        if self._tied_to is not None:
            return held
        if self.quantised is not None:
            return held + self.quantised.nbytes
        return held + self.tensor.numel() * self.tensor.element_size()

    # -- helpers -----------------------------------------------------------------------------------------------------

    def _share(self, tied: Weight) -> None:
        own, other = self.spec, tied.spec
        if not isinstance(tied, TensorWeight):
            self._refuse(f"cannot share the storage of {other.site!r}, a {type(tied).__name__}")
        if (own.experts, own.n, own.k, own.dtype, own.quantisation) != (
            other.experts,
            other.n,
            other.k,
            other.dtype,
            other.quantisation,
        ):
            self._refuse(f"cannot share the storage of {other.site!r}: {own} and {other} differ in shape or dtype")
        self._tied_to = other.site
        self._tensor, self.quantised = tied._tensor, tied.quantised

    def _block(self, stored: torch.Tensor, slice_index: int, row: int, rows: int, expert: int | None) -> torch.Tensor:
        """The written rows of a stored tensor whose dimension after ``experts`` is ``n``."""
        if expert is not None:
            stored = stored[expert]
        start = self.spec.starts[slice_index] + row
        return stored[start : start + rows]

    def _check_open(self) -> None:
        if self._sealed:
            self._refuse("is sealed; call reopen() before writing")

    def _check_writable(self) -> None:
        self._check_open()
        if self._tied_to is not None:
            self._refuse(f"shares the storage of {self._tied_to!r}; write there")

    def _check_canonical(
        self, quantisation: Quantisation, codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, col: int
    ) -> None:
        size, (rows, cols) = quantisation.group_size, codes.shape
        if col % size or (cols % size and col + cols != self.spec.k):
            self._refuse(f"columns {col}:{col + cols} do not start and end on groups of {size}")
        expected = (rows, quantisation.groups(cols))
        if tuple(zeros.shape) != expected or tuple(scales.shape) != expected:
            self._refuse(f"zeros {list(zeros.shape)} and scales {list(scales.shape)}, expected {list(expected)}")
        if codes.dtype != torch.uint8 or zeros.dtype != torch.uint8 or scales.dtype != quantisation.scale_dtype:
            self._refuse(
                f"codes {codes.dtype}, zeros {zeros.dtype} and scales {scales.dtype}, "
                f"expected torch.uint8, torch.uint8 and {quantisation.scale_dtype}"
            )
        top = 2**quantisation.bits - 1
        for name, values in (("code", codes), ("zero", zeros)):
            if values.numel() and int(values.max()) > top:
                self._refuse(f"{name} {int(values.max())} does not fit in {quantisation.bits} bits")

    def _refuse(self, reason: str) -> NoReturn:
        raise OperatorError(f"Weight.write({self.spec.site})", f"the weight {reason}")


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """``[rows, k]`` uint8 codes as stored bytes (see :class:`QuantisedTensors`); a missing last column is zero."""
    if _codes_per_byte(bits) == 1:
        return codes
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_codes(packed: torch.Tensor, bits: int, k: int) -> torch.Tensor:
    """The inverse of :func:`pack_codes`: ``[..., k]`` uint8."""
    if _codes_per_byte(bits) == 1:
        return packed
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)[..., :k]


def _codes_per_byte(bits: int) -> int:
    return 2 if bits == 4 else 1


def _allocate_quantised(
    spec: WeightSpec, quantisation: Quantisation, lead: tuple[int, ...], device: Device
) -> QuantisedTensors:
    bits, size = quantisation.bits, quantisation.group_size
    if not 1 <= bits <= 8 or size < 1:
        raise ConfigurationError(
            f"weight {spec.site!r}: {bits} bits in groups of {size}, expected 1 to 8 bits, groups >= 1"
        )
    per_byte = _codes_per_byte(bits)
    if size % per_byte and size < spec.k:
        raise ConfigurationError(
            f"weight {spec.site!r}: group size {size} splits a byte of two 4-bit codes; use an even one"
        )
    groups = quantisation.groups(spec.k)
    return QuantisedTensors(
        codes=device.zeros((*lead, spec.n, -(-spec.k // per_byte)), torch.uint8),
        zeros=device.zeros((*lead, spec.n, groups), torch.uint8),
        scales=device.zeros((*lead, spec.n, groups), quantisation.scale_dtype),
    )
