"""The adapters of one site, slot after slot, so that the slots of a step are one batch of matrices without a copy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch

from polyaccel.backend.adapter_store import LoraMatrices
from polyaccel.backend.weight import WeightSpec


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SlotMatrices:
    """A slot of R rank rows from row f on owns ``A: [slices, R, k]`` and ``B: [chunks, R, width]``, each contiguous.

    ``width`` divides the width of every slice, so a row of y is ``chunks`` pieces of one width, whatever the slices
    are: with h repeated for each chunk of its slice, all slices of all slots are expanded by one batched product.

    Attributes:
        starts: first chunk of each slice, and the end.
        chunk_slices: ``[chunks]`` int64, the slice of each chunk; None where chunks are slices.
        a, b: flat storage of all slots.
    """

    slices: int
    rank_rows: int
    k: int
    n: int
    width: int
    starts: tuple[int, ...]
    chunk_slices: torch.Tensor | None
    a: torch.Tensor
    b: torch.Tensor

    @classmethod
    def allocate(cls, spec: WeightSpec, rank_rows: int) -> SlotMatrices:
        width = max(1, math.gcd(*(part.n for part in spec.slices)))
        starts = tuple(start // width for start in spec.starts)
        counts = [end - start for start, end in pairwise(starts)]
        owners = [index for index, count in enumerate(counts) for _ in range(count)]
        return cls(
            slices=len(spec.slices),
            rank_rows=rank_rows,
            k=spec.k,
            n=spec.n,
            width=width,
            starts=starts,
            chunk_slices=None if owners == list(range(len(spec.slices))) else torch.tensor(owners, dtype=torch.int64),
            a=torch.zeros(rank_rows * len(spec.slices) * spec.k, dtype=spec.dtype),
            b=torch.zeros(rank_rows * spec.n, dtype=spec.dtype),
        )

    @property
    def chunks(self) -> int:
        return self.starts[-1]

    def a_of(self, first: int, rows: int) -> torch.Tensor:
        """View ``[slices, rows, k]`` of a slot."""
        size = self.slices * self.k
        return self.a[first * size : (first + rows) * size].view(self.slices, rows, self.k)

    def b_of(self, first: int, rows: int) -> torch.Tensor:
        """View ``[chunks, rows, width]`` of a slot."""
        return self.b[first * self.n : (first + rows) * self.n].view(self.chunks, rows, self.width)

    def write(self, slice_index: int, first: int, rows: int, a: torch.Tensor, b: torch.Tensor) -> None:
        """Store ``a: [rank, k]`` and ``b: [n of the slice, rank]`` of a slot of ``rows`` zeroed rank rows."""
        own_a, own_b = self._own(slice_index, first, rows, a.shape[0])
        own_a.copy_(a)
        own_b.copy_(b.view(own_b.shape))

    def read(self, slice_index: int, first: int, rows: int, rank: int) -> LoraMatrices:
        """``a``: a view, ``b``: a copy."""
        a, b = self._own(slice_index, first, rows, rank)
        return LoraMatrices(a=a, b=b.reshape(-1, rank))

    def _own(self, slice_index: int, first: int, rows: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views ``[rank, k]`` and ``[chunks of the slice, width, rank]``; at once, for there may be many modules."""
        start, end = self.starts[slice_index], self.starts[slice_index + 1]
        a = self.a.as_strided((rank, self.k), (self.k, 1), (first * self.slices + slice_index * rows) * self.k)
        place = (first * self.chunks + start * rows) * self.width
        b = self.b.as_strided((end - start, self.width, rank), (rows * self.width, 1, self.width), place)
        return a, b
