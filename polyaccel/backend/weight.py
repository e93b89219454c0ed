"""Weights: described by the core, stored by the backend.

``linear`` takes only a :class:`Weight`, never a bare tensor. Packing, transposition, tile layouts and the room for
adapters' A rows belong to the backend; what a weight *is* stays recoverable through ``dequantize``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from polyaccel.backend.errors import ConfigurationError, OperandInfo
from polyaccel.backend.placed import Placed


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """One of the matrices that share an input, such as q, k and v: ``n`` output rows on this rank."""

    name: str
    n: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantisation:
    """The canonical weight-only form that every checkpoint reader maps to (AWQ, GPTQ, compressed-tensors).

    A value is ``(q - z) * s``: ``q`` and ``z`` unsigned ``bits``-bit integers, ``s`` of ``scale_dtype``; integer
    subtract, float32 multiply, one rounding to ``dtype`` of the weight. Group ``g = k // group_size``.
    """

    bits: int = 4
    group_size: int = 128
    scale_dtype: torch.dtype = torch.float16

    def groups(self, k: int) -> int:
        return -(-k // self.group_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSpec:
    """A weight as this rank holds it: ``[sum of slices' n, k]``, or ``[experts, ...]`` of those.

    ``site`` names the place in the model and is how adapters find it. ``rank_rows`` is the room for adapters' rank rows
    per slice (0: no adapter will ever be applied here). ``lookup``: an embedding table, of which adapters look up
    columns of A (``a: [rank, n]``, ``b: [k, rank]``) instead of multiplying by them (``a: [rank, k]``, ``b: [n,
    rank]``).
    """

    site: str
    slices: tuple[Slice, ...]
    k: int
    dtype: torch.dtype
    bias: bool = False
    quantisation: Quantisation | None = None
    rank_rows: int = 0
    experts: int | None = None
    tied_to: str | None = None
    lookup: bool = False

    def __post_init__(self) -> None:
        if not self.slices or self.k < 0 or any(s.n < 0 for s in self.slices):
            raise ConfigurationError(
                f"weight {self.site!r}: slices {self.slices} and k {self.k} do not describe a matrix"
            )

    @property
    def n(self) -> int:
        """Output rows of all slices."""
        return sum(s.n for s in self.slices)

    @property
    def starts(self) -> tuple[int, ...]:
        """First output row of each slice, and the end."""
        starts = [0]
        for part in self.slices:
            starts.append(starts[-1] + part.n)
        return tuple(starts)


class Weight(Placed, ABC):
    """A weight in the backend's own storage.

    Life: allocated, written piece by piece, sealed (packing happens here, without a second full copy of the weight),
    used. ``reopen`` undoes ``seal`` so that a merge can write again.
    """

    spec: WeightSpec

    @abstractmethod
    def write(
        self,
        slice_index: int,
        source: torch.Tensor,
        *,
        row: int = 0,
        col: int = 0,
        expert: int | None = None,
    ) -> None:
        """Copy a host tensor ``[rows, cols]`` to rows ``row:`` and columns ``col:`` of a slice, casting to the dtype.

        The source may be reused when this returns.

        Raises:
            OperatorError: out of range, or the weight is sealed.
        """

    @abstractmethod
    def write_bias(self, slice_index: int, source: torch.Tensor, *, row: int = 0, expert: int | None = None) -> None:
        """Copy a host vector to the bias of a slice."""

    @abstractmethod
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
        """Write the canonical form: ``codes: [rows, cols]`` uint8, ``zeros, scales: [rows, groups]`` (uint8, scale
        dtype).

        ``col`` is a multiple of the group size.
        """

    @abstractmethod
    def seal(self) -> None:
        """No more writes: pack into the final layout. Idempotent."""

    @abstractmethod
    def reopen(self) -> None:
        """Allow writes again, for merging an adapter into the base and undoing it."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of device memory held, packing and bias included, rank rows excluded."""

    def operand(self, name: str) -> OperandInfo:
        shape = (self.spec.n, self.spec.k)
        return OperandInfo(
            name=name,
            shape=shape if self.spec.experts is None else (self.spec.experts, *shape),
            stride=(),
            dtype=str(self.spec.dtype).removeprefix("torch."),
            device=str(self.torch_device),
            contiguous=True,
        )


def check_write(
    spec: WeightSpec, slice_index: int, shape: Sequence[int], row: int, col: int, expert: int | None
) -> None:
    """Refuse a write outside the weight, before any memory is touched. Shared by all backends."""
    from polyaccel.backend.errors import OperatorError

    def refuse(reason: str) -> None:
        raise OperatorError(f"Weight.write({spec.site})", reason)

    if not 0 <= slice_index < len(spec.slices):
        refuse(f"slice {slice_index} of {len(spec.slices)}")
    if len(shape) != 2:
        refuse(f"source has {len(shape)} dimensions, expected 2")
    if (expert is None) != (spec.experts is None) or (expert is not None and not 0 <= expert < (spec.experts or 0)):
        refuse(f"expert {expert} of {spec.experts}")
    rows, cols = shape
    part = spec.slices[slice_index]
    if row < 0 or row + rows > part.n or col < 0 or col + cols > spec.k:
        refuse(f"rows {row}:{row + rows}, columns {col}:{col + cols} of slice {part.name!r} [{part.n}, {spec.k}]")
