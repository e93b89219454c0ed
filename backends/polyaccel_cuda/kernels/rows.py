"""The adapters of a step's rows, in device memory, as kernels take them: rows with the same adapters are one unit."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Enough programs that every multiprocessor of a large chip has several; beyond, each takes unit after unit.
PROGRAMS = 2048
SPLIT_PROGRAMS = 528

# Measured: below this many rank rows a row, or with fewer rows, one more launch costs more than it saves.
SPLIT_ROWS, SPLIT_RANK_ROWS = 8, 8
# The expand's bytes are fewer: it takes more rows to pay.
SPLIT_EXPAND_ROWS = 32
SPLIT_ROPE_ROWS = 32


def splits(rows: int, rank_rows: int) -> bool:
    """Whether units of one row are left to kernels of their own, where ``rank_rows`` may be named in all."""
    return rows >= SPLIT_ROWS and rank_rows >= SPLIT_RANK_ROWS * rows


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Units:
    """Units of at most ``rows`` rows that name the same slots; every row is in one, those without adapters too.

    A unit's first slot is the segment of the unit's own number; its other slots are segments from :attr:`most` on.

    Attributes:
        b: ``[rank rows, n]`` of one site, dense, slices side by side.
        rows: rows of a unit.
        most: units that a launch serves. What is beyond those that there are has no members.
        count: ``[2]`` int32, how many units there are, and how many of them have several rows; those come first.
        split: the others are left to kernels that stream B for one row each, launched beside.
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
    split: bool
    count: torch.Tensor
    members: torch.Tensor
    first: torch.Tensor
    place: torch.Tensor
    rank: torch.Tensor
    mix: torch.Tensor
    more: torch.Tensor
    largest: int = 0
    mixed: bool = True
    batch_invariant: bool = False

    def lanes(self, programs: int, split: bool = False) -> tuple[int, bool]:
        """Programs that share the units, where each unit takes ``programs``; and whether any takes several.

        ``split``: rows alone are another launch's, so that often no unit is left for this one.
        """
        lanes = max(1, min(self.most, -(-(SPLIT_PROGRAMS if split else PROGRAMS) // programs)))
        return lanes, lanes < self.most


Pointers = tuple[torch.Tensor | int, ...]


def pointers(h: torch.Tensor, units: Units) -> Pointers:
    """``h``, its row stride and the tables, as kernels take them."""
    tables = (units.count, units.members, units.first, units.place, units.rank, units.mix, units.more)
    return h, h.stride(0), units.b, *tables
