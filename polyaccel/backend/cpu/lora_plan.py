"""How a row set's adapters are applied: which rows go together through which batch of A and B matrices.

Segments (runs of triples of one slot) whose rows, ranks and distances between first rank rows are equal form one batch,
so that eight requests on eight adapters of one rank are one batched product a projection: each adapter's A and B are
read once, in place, and no row multiplies by another's. Where ranks are mixed, single rows are gathered into a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from polyaccel.backend.step import AdapterRows

if TYPE_CHECKING:
    from polyaccel.backend.cpu.adapter_store import RankMajorAdapterStore

# Fixed cost of one more batch at a projection, in bytes that could be copied instead; measured, see docs/cpu.md.
BATCH_COST_BYTES = 1 << 18


class SegmentRanks(NamedTuple):
    """Where one slot's rank rows begin, and how many of them a site uses: at most, and by slice."""

    first: int
    rank: int
    by_slice: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Expand:
    """Columns ``start:end`` of y get ``h[slice] @ b`` with ``b: [segments, rank, end - start]``."""

    slice: int
    start: int
    end: int
    b: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """Segments that go through one batched product at one site.

    Attributes:
        segments: how many; rows: of each of them.
        run: the rows of x and y where they are consecutive; index: ``[segments * rows]`` int64 otherwise.
        mix: ``[segments, rows, 1]``, or None where all weights are 1.
        a: ``[segments, k, rank * slices]``, rank rows outer: a view of the store, or None where ``gather`` says which.
        gather: rank rows ``[segments * rank]`` int64; keep: ``[segments, 1, rank]``, 0 on rows beyond the true rank.
    """

    segments: int
    rows: int
    rank: int
    slices: int
    run: slice | None
    index: torch.Tensor | None
    mix: torch.Tensor | None
    a: torch.Tensor | None
    expands: tuple[Expand, ...]
    gather: torch.Tensor | None = None
    keep: torch.Tensor | None = None
    a_rows: torch.Tensor | None = None


class AdapterPlan:
    """The plan of one row set; batches are worked out per site when first asked for.

    Attributes:
        single: no row has two adapters and all mix weights are 1.
    """

    def __init__(self, store: RankMajorAdapterStore, triples: AdapterRows) -> None:
        self._store = store
        self._triples = triples
        self._slots: list[int] = triples.segment_slots.tolist()
        self._starts: list[int] = triples.starts.tolist()
        self._weighted = bool(np.any(triples.weights != 1.0))
        self.single = not self._weighted and len(np.unique(triples.rows)) == len(triples)
        self._sites: dict[str, tuple[Batch, ...]] = {}

    def batches(self, site: str) -> tuple[Batch, ...]:
        """The batches at a site; none where no adapter of the step touches it."""
        found = self._sites.get(site)
        if found is None:
            found = self._sites[site] = tuple(self._build(site)) if site in self._store.sites else ()
        return found

    def _build(self, site: str) -> list[Batch]:
        ranks = self._store.segment_ranks(site, self._slots)
        used = [i for i, segment in enumerate(ranks) if segment.rank > 0]
        groups = self._group(used, ranks)
        singles = [i for i in used if self._rows(i) == 1]
        if len(singles) > 1:
            # Batches of single rows, each in its place, against one batch of copies.
            in_place = [group for group in groups if self._rows(group[0]) == 1]
            largest = max(ranks[i].rank for i in singles)
            if (len(in_place) - 1) * BATCH_COST_BYTES > 2 * len(singles) * largest * self._row_bytes(site):
                others = [group for group in groups if self._rows(group[0]) > 1]
                return [*(self._strided(site, group, ranks) for group in others), self._gathered(site, singles, ranks)]
        return [self._strided(site, group, ranks) for group in groups]

    def _group(self, used: Sequence[int], ranks: Sequence[SegmentRanks]) -> list[list[int]]:
        groups: list[list[int]] = []
        for i in used:
            last = groups[-1] if groups else None
            if last is not None and self._continues(last, i, ranks):
                last.append(i)
            else:
                groups.append([i])
        return groups

    def _continues(self, group: Sequence[int], i: int, ranks: Sequence[SegmentRanks]) -> bool:
        previous = ranks[group[-1]]
        if self._rows(i) != self._rows(group[0]) or ranks[i].by_slice != previous.by_slice:
            return False
        stride = ranks[i].first - previous.first
        if len(group) == 1:
            return stride > 0
        return stride == previous.first - ranks[group[-2]].first

    def _strided(self, site: str, group: Sequence[int], ranks: Sequence[SegmentRanks]) -> Batch:
        first, rank, by_slice = ranks[group[0]]
        stride = ranks[group[1]].first - first if len(group) > 1 else rank
        a_rows = self._store.a_rows(site)
        _, slices, k = a_rows.shape
        expands = []
        column = 0
        for i, b in enumerate(self._store.sites[site].b):
            if by_slice[i] and b.shape[1]:
                view = b[first:].as_strided((len(group), rank, b.shape[1]), (stride * b.stride(0), b.stride(0), 1))
                expands.append(Expand(i, column, column + b.shape[1], view))
            column += b.shape[1]
        start = a_rows[first:]
        a = start.as_strided((len(group), rank * slices, k), (stride * a_rows.stride(0), k, 1)).transpose(1, 2)
        return self._batch(group, rank=rank, slices=slices, a=a, expands=tuple(expands))

    def _gathered(self, site: str, group: Sequence[int], ranks: Sequence[SegmentRanks]) -> Batch:
        rank = max(ranks[i].rank for i in group)
        own = np.array([ranks[i].rank for i in group])[:, None]
        place = np.arange(rank)[None, :]
        first = np.array([ranks[i].first for i in group])[:, None]
        rows = torch.from_numpy((first + np.minimum(place, own - 1)).reshape(-1).astype(np.int64))
        a_rows = self._store.a_rows(site)
        keep = torch.from_numpy((place < own)[:, None, :]).to(a_rows.dtype)
        expands = []
        column = 0
        for i, b in enumerate(self._store.sites[site].b):
            if b.shape[1] and any(ranks[j].by_slice[i] for j in group):
                expands.append(Expand(i, column, column + b.shape[1], b))
            column += b.shape[1]
        return self._batch(
            group,
            rank=rank,
            slices=a_rows.shape[1],
            a=None,
            expands=tuple(expands),
            gather=rows,
            keep=keep,
            a_rows=a_rows,
        )

    def _batch(
        self,
        group: Sequence[int],
        *,
        rank: int,
        slices: int,
        a: torch.Tensor | None,
        expands: tuple[Expand, ...],
        gather: torch.Tensor | None = None,
        keep: torch.Tensor | None = None,
        a_rows: torch.Tensor | None = None,
    ) -> Batch:
        triples, each = self._triples, self._rows(group[0])
        places = np.concatenate([np.arange(self._starts[i], self._starts[i + 1]) for i in group])
        rows = triples.rows[places].astype(np.int64)
        consecutive = bool(np.all(rows[1:] - rows[:-1] == 1))
        mix = None
        if self._weighted:
            mix = torch.from_numpy(triples.weights[places].reshape(len(group), each, 1))
        return Batch(
            segments=len(group),
            rows=each,
            rank=rank,
            slices=slices,
            run=slice(int(rows[0]), int(rows[0]) + len(rows)) if consecutive else None,
            index=None if consecutive else torch.from_numpy(rows),
            mix=mix,
            a=a,
            expands=expands,
            gather=gather,
            keep=keep,
            a_rows=a_rows,
        )

    def _rows(self, segment: int) -> int:
        return self._starts[segment + 1] - self._starts[segment]

    def _row_bytes(self, site: str) -> int:
        """Bytes of one rank row of A and B at a site."""
        buffers = self._store.sites[site]
        width = self._store.a_rows(site).shape[1:].numel() + sum(b.shape[1] for b in buffers.b)
        return width * buffers.a.element_size()
