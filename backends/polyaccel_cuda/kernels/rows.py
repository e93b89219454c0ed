"""The adapters of a step's rows, in device memory, as kernels take them: rows with the same adapters are one unit."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Enough programs that every multiprocessor of a large chip has several; beyond, each takes unit after unit.
PROGRAMS = 2048

STREAM_ROWS, STREAM_RANK_ROWS = 16, 8
"""Up to so many rows, or from so many rank rows a row on, streaming is faster than tiles. See docs/cuda.md."""


def streams(rows: int, rank_rows: int) -> bool:
    """Whether each row reads B for itself, where ``rank_rows`` may be named in all. What rows share, the cache has for
    all but the first of them."""
    return rows <= STREAM_ROWS or rank_rows >= STREAM_RANK_ROWS * rows


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Units:
    """Units of at most ``rows`` rows that name the same slots; every row is in one, those without adapters too.

    A unit's first slot is the segment of the unit's own number; its other slots are segments from :attr:`most` on.

    Attributes:
        b: ``[rank rows, n]`` of one site, dense, slices side by side.
        rows: rows of a unit.
        most: units that a launch serves. What is beyond those that there are has no members.
        streamed: rows are left to kernels that stream B for one row each.
        seats: ``[1 + rows]`` int32, how many units there are; then, unit after unit, where in ``members`` each row is.
        members: ``[most, rows]`` int32, -1 beyond a unit's own.
        first, place, rank: ``[segments]`` int32, the slot's first rank row in B and in what the product left, and how
            many there are; 0 of a unit without adapters.
        mix: ``[segments, rows]`` float32.
        more: ``[most + 1]`` int32, where a unit's other segments begin.
        largest: the largest rank of any segment, at least 1, where the host knows it: of a prefill, which no graph
            holds; 0 where a graph may be replayed with others.
        mixed: whether a unit may have several segments.
        batch_invariant: no form of a sum may depend on what else is in the step.
    """

    b: torch.Tensor
    rows: int
    most: int
    streamed: bool
    seats: torch.Tensor
    members: torch.Tensor
    first: torch.Tensor
    place: torch.Tensor
    rank: torch.Tensor
    mix: torch.Tensor
    more: torch.Tensor
    largest: int = 0
    mixed: bool = True
    batch_invariant: bool = False

    def lanes(self, programs: int) -> tuple[int, bool]:
        """Programs that share the units, where each unit takes ``programs``; and whether any takes several."""
        lanes = max(1, min(self.most, -(-PROGRAMS // programs)))
        return lanes, lanes < self.most


Pointers = tuple[torch.Tensor | int, ...]


def pointers(h: torch.Tensor, units: Units) -> Pointers:
    """``h``, its row stride and the tables, as kernels take them."""
    tables = (units.seats, units.members, units.first, units.place, units.rank, units.mix, units.more)
    return h, h.stride(0), units.b, *tables
