"""How a row set's adapters are applied: which rows go together through which batch of A and B matrices.

Segments (runs of triples of one slot) of equally many rows whose slots have equally many rank rows and lie one after
the other form one batch. Eight requests on eight adapters of one rank are thus one batched product to shrink and one
to expand: each adapter is read once, in place, and no row multiplies by another's. Where ranks are mixed, single rows
are gathered into such a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from polyaccel.backend.cpu.slot_matrices import SlotMatrices
from polyaccel.backend.step import AdapterRows

if TYPE_CHECKING:
    from polyaccel.backend.cpu.adapter_store import SlotMajorAdapterStore

# Fixed cost of one more batch at a site, in bytes that could be copied instead; measured, see docs/cpu.md.
BATCH_COST_BYTES = 1 << 18


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Gather:
    """Copies instead of views: rows of the flat A and B, and which of them count.

    Attributes:
        a: ``[segments * slices * rank]`` int64 rows of ``[rank_rows * slices, k]``.
        b: ``[segments * chunks * rank]`` int64 rows of ``[rank_rows * chunks, width]``.
        keep: ``[segments, 1, slices * rank]`` of the dtype, 0 where a slot has no such rank row.
    """

    a: torch.Tensor
    b: torch.Tensor
    keep: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """Segments that go through one batched product at one site.

    Attributes:
        segments: how many; rows: of each of them; rank: rank rows of each slot.
        run: the rows of x and y where they are consecutive; index: ``[segments * rows]`` int64 otherwise.
        mix: ``[segments, rows, 1]``, or None where all weights are 1.
        a: ``[segments, k, slices * rank]`` and b: ``[segments * chunks, rank, width]``, views of the store, or empty
            where ``gather`` says what to copy.
    """

    matrices: SlotMatrices
    segments: int
    rows: int
    rank: int
    run: slice | None
    index: torch.Tensor | None
    mix: torch.Tensor | None
    a: torch.Tensor
    b: torch.Tensor
    gather: Gather | None

    def covers(self, rows: int) -> bool:
        """Whether these are all rows of x, in order."""
        return self.run is not None and self.run.start == 0 and self.run.stop == rows


@dataclass(frozen=True, slots=True)
class _Segment:
    """Triples ``start:end`` of one slot, and its rank rows."""

    start: int
    end: int
    slot: int
    first: int
    rank: int

    @property
    def rows(self) -> int:
        return self.end - self.start


class AdapterPlan:
    """The plan of one row set; batches are worked out per site when first asked for.

    Attributes:
        single: no row has two adapters and all mix weights are 1.
        decode: every segment is a single row.
    """

    def __init__(self, store: SlotMajorAdapterStore, triples: AdapterRows) -> None:
        self._store = store
        self._triples = triples
        starts, ranges = triples.starts.tolist(), store.ranges()
        self._segments = [
            _Segment(start, end, slot, where.first_rank_row, where.rank_rows)
            for slot, start, end in zip(triples.segment_slots.tolist(), starts[:-1], starts[1:], strict=True)
            if (where := ranges[slot]) is not None and where.rank_rows > 0
        ]
        self._weighted = bool(np.any(triples.weights != 1.0))
        self.single = not self._weighted and len(np.unique(triples.rows)) == len(triples)
        self.decode = all(segment.rows == 1 for segment in self._segments)
        self._sites: dict[str, tuple[Batch, ...]] = {}

    def batches(self, site: str) -> tuple[Batch, ...]:
        """The batches at a site; none where no adapter of the step touches it."""
        found = self._sites.get(site)
        if found is None:
            matrices = self._store.linear.get(site)
            found = self._sites[site] = () if matrices is None else tuple(self._build(site, matrices))
        return found

    def _build(self, site: str, matrices: SlotMatrices) -> list[Batch]:
        used = [segment for segment in self._segments if self._store.touches(site, segment.slot)]
        groups: list[list[_Segment]] = []
        for segment in used:
            if groups and _continues(groups[-1][-1], segment):
                groups[-1].append(segment)
            else:
                groups.append([segment])
        singles = [segment for segment in used if segment.rows == 1]
        of_singles = [group for group in groups if group[0].rows == 1]
        if len(of_singles) > 1:
            row_bytes = (matrices.slices * matrices.k + matrices.n) * matrices.a.element_size()
            copied = 2 * len(singles) * max(segment.rank for segment in singles) * row_bytes
            if (len(of_singles) - 1) * BATCH_COST_BYTES > copied:
                others = [group for group in groups if group[0].rows > 1]
                return [*(self._views(matrices, group) for group in others), self._copies(matrices, singles)]
        return [self._views(matrices, group) for group in groups]

    def _views(self, matrices: SlotMatrices, group: Sequence[_Segment]) -> Batch:
        first, rank = group[0].first, group[0].rank
        everything = len(group) * rank
        a = matrices.a_of(first, everything).view(len(group), matrices.slices * rank, matrices.k).transpose(1, 2)
        b = matrices.b_of(first, everything).view(len(group) * matrices.chunks, rank, matrices.width)
        return self._batch(matrices, group, rank, a, b, None)

    def _copies(self, matrices: SlotMatrices, group: Sequence[_Segment]) -> Batch:
        rank = max(segment.rank for segment in group)
        own = np.array([segment.rank for segment in group], dtype=np.int64)[:, None, None]
        first = np.array([segment.first for segment in group], dtype=np.int64)[:, None, None]
        place = np.arange(rank)[None, None, :]
        inside = np.minimum(place, own - 1)
        a = first * matrices.slices + np.arange(matrices.slices)[None, :, None] * own + inside
        b = first * matrices.chunks + np.arange(matrices.chunks)[None, :, None] * own + inside
        keep = np.broadcast_to(place < own, a.shape).reshape(len(group), 1, -1)
        gather = Gather(
            a=torch.from_numpy(a.reshape(-1)),
            b=torch.from_numpy(b.reshape(-1)),
            keep=torch.from_numpy(keep.copy()).to(matrices.a.dtype),
        )
        return self._batch(matrices, group, rank, matrices.a[:0], matrices.b[:0], gather)

    def _batch(
        self,
        matrices: SlotMatrices,
        group: Sequence[_Segment],
        rank: int,
        a: torch.Tensor,
        b: torch.Tensor,
        gather: Gather | None,
    ) -> Batch:
        each = group[0].rows
        places = np.concatenate([np.arange(segment.start, segment.end) for segment in group])
        rows = self._triples.rows[places].astype(np.int64)
        consecutive = bool(np.all(rows[1:] - rows[:-1] == 1))
        mix = None
        if self._weighted:
            mix = torch.from_numpy(self._triples.weights[places].reshape(len(group), each, 1))
        return Batch(
            matrices=matrices,
            segments=len(group),
            rows=each,
            rank=rank,
            run=slice(int(rows[0]), int(rows[0]) + len(rows)) if consecutive else None,
            index=None if consecutive else torch.from_numpy(rows),
            mix=mix,
            a=a,
            b=b,
            gather=gather,
        )


def _continues(previous: _Segment, segment: _Segment) -> bool:
    return (
        segment.rows == previous.rows
        and segment.rank == previous.rank
        and segment.first == previous.first + previous.rank
    )
