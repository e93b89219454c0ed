"""Adapters in device memory: slots, rank rows and the packed form in which one arrives.

The engine decides slot numbers and rank-row ranges; the backend owns the bytes. A slot's content has stable addresses,
and loading one is a single copy of a packed buffer plus a scatter.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from polyaccel.backend.device import Event
from polyaccel.backend.placed import Placed

AdapterKind = Literal["linear", "embedding"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedEntry:
    """Where one module's A and B lie in a packed buffer; offsets count elements of its dtype.

    ``a_shape`` is ``[rank, k]`` (this rank's input columns; for an embedding ``[rank, vocabulary rows]``) and
    ``b_shape`` is ``[n, rank]`` (this rank's output rows), both row-major, the scale folded into B.
    """

    site: str
    slice: int
    expert: int | None
    kind: AdapterKind
    rank: int
    a_offset: int
    a_shape: tuple[int, int]
    b_offset: int
    b_shape: tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedAdapter:
    """One rank's share of an adapter: a host buffer (1-D, one dtype) and its table."""

    buffer: torch.Tensor
    entries: tuple[PackedEntry, ...]
    max_rank: int

    def a(self, entry: PackedEntry) -> torch.Tensor:
        """View ``[rank, k]``."""
        return self._matrix(entry.a_offset, entry.a_shape)

    def b(self, entry: PackedEntry) -> torch.Tensor:
        """View ``[n, rank]``."""
        return self._matrix(entry.b_offset, entry.b_shape)

    def _matrix(self, offset: int, shape: tuple[int, int]) -> torch.Tensor:
        return self.buffer[offset : offset + shape[0] * shape[1]].view(shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotRange:
    """A slot and its contiguous rank rows ``first_rank_row : first_rank_row + rank_rows``, the same at every site."""

    slot: int
    first_rank_row: int
    rank_rows: int


@dataclass(frozen=True, slots=True)
class LoraMatrices:
    """One slice of one slot: ``a: [rank, k]``, ``b: [n, rank]`` with the scale folded in. Views where possible."""

    a: torch.Tensor
    b: torch.Tensor


class AdapterStore(Placed, ABC):
    """The adapters of one device.

    ``write`` is ordered with the operators of the device but never names a slot that a queued step uses; the engine
    publishes a slot only after every rank acknowledged its event.
    """

    slots: int
    rank_rows: int

    @abstractmethod
    def write(self, where: SlotRange, packed: PackedAdapter) -> Event:
        """Replace the slot's content. The buffer may be reused once the event has completed.

        Raises:
            OperatorError: an entry names an unknown site, slice or expert or has another shape, or the range is not
                within the store's rows or overlaps another slot's; the slot is left empty.
        """

    @abstractmethod
    def clear(self, slot: int) -> None:
        """Empty the slot: rows that still name it get no delta.

        Raises:
            OperatorError: no such slot.
        """

    @abstractmethod
    def ranges(self) -> Sequence[SlotRange | None]:
        """The range of each slot, None where empty. Host-side."""

    def graph_rank_rows(self, slots: Collection[int], rows: int) -> int:
        """Rank rows that a graph of ``rows`` rows must cover to serve these slots. Host-side.

        Default: all up to the last one of theirs. A backend whose products read only the rank rows that a step names
        says how many those are.
        """
        ranges = self.ranges()
        return max((r.first_rank_row + r.rank_rows for slot in slots if (r := ranges[slot]) is not None), default=0)

    @abstractmethod
    def true_rank(self, site: str, slice_index: int, slot: int, expert: int | None = None) -> int:
        """Rank of a module in a slot; 0 where the adapter does not touch it. Host-side."""

    @abstractmethod
    def read(self, site: str, slice_index: int, slot: int, expert: int | None = None) -> LoraMatrices | None:
        """The module's matrices in canonical form on the device, for composites and tests. None where untouched."""

    @property
    @abstractmethod
    def nbytes(self) -> int: ...
