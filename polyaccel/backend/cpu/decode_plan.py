"""How sequences with one query each are attended together.

Copied: keys and values of all sequences padded to one length, one batched product each: the fewest passes, for what
fits in a core's own cache. Keys in place: a block is one matrix a head, so the scores of all blocks are one batched
product without a copy of keys; only values are copied. All in place: values are not copied either, at the cost of more
passes over sums; for long contexts. Measured, see docs/cpu.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from polyaccel.backend.kv_cache import KVSpec

# Keys and values of a batch up to which both are copied, and values of a sequence up to which they are: bytes.
COPY_BOTH_BYTES = 1 << 19
COPY_VALUES_BYTES = 5 << 17
# Blocks of others that may lie between a batch's own before copying its own is cheaper: a share of them.
IDLE_SHARE = 0.25

Ints = npt.NDArray[np.int64]
Tables = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Edges:
    """Blocks that are only partly visible. Their hidden slots may hold anything, also infinities.

    Attributes:
        scores: flat indices int64 of hidden scores.
        blocks: ``[edges * kv_heads]`` int64, which (block, head) products are affected.
        value_rows: ``[edges * kv_heads * block_size]`` int64 rows of the cache's values, a visible one for each hidden.
    """

    scores: torch.Tensor
    blocks: torch.Tensor
    value_rows: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BlockBatch:
    """Queries ``begin:end``, one of each of ``sequences`` sequences, over ``blocks`` cache blocks.

    Attributes:
        first: the first of consecutive cache blocks, or None where ``gather: [blocks]`` int64 lists them.
        owner: ``[blocks]`` int64, the sequence that a block belongs to.
        places: ``[sequences * most]`` int64, each sequence's blocks, the last one repeated as padding; None where the
            blocks are in order of sequence and equally many.
        own, bags: places without the padding, int64, and where each sequence's begin.
        most: the largest number of blocks of a sequence.
        edges: partly visible blocks, None if there are none.
    """

    begin: int
    end: int
    blocks: int
    first: int | None
    gather: torch.Tensor | None
    owner: torch.Tensor
    places: torch.Tensor | None
    own: torch.Tensor
    bags: torch.Tensor
    most: int
    edges: Edges | None

    @property
    def sequences(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class KeysInPlace:
    """Consecutive cache blocks ``first:first + blocks`` whose keys are multiplied where they are.

    Attributes:
        owner: ``[blocks]`` int64, the sequence that a block belongs to.
        order: ``[sequences * kv_heads * blocks of a sequence]`` int64, where the padded order finds its (block, head).
    """

    first: int
    blocks: int
    owner: torch.Tensor
    order: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PaddedBatch:
    """The same queries over copies ``[sequences, kv_heads, keys]`` of their blocks, padded to equal length.

    Attributes:
        keys: padded length.
        in_place: where the keys are if they are not copied.
        matrices: one for each head of each block to copy (:meth:`HeadMajorKVCache.copies`): keys, if they are copied,
            then values.
        hidden: flat rows ``(sequence, key head, key)`` int64 that must not be read; None if there are none.
        hidden_scores: flat ``(sequence, head, key)`` int64 of the same, and mask: ``[sequences, 1, 1, keys]``, minus
            infinity there; the one that the dtype's product needs.
    """

    begin: int
    end: int
    keys: int
    in_place: KeysInPlace | None
    matrices: torch.Tensor
    hidden: torch.Tensor | None
    hidden_scores: torch.Tensor | None
    mask: torch.Tensor | None


class DecodePlanner:
    """Plans for one cache geometry, number of query heads and window."""

    def __init__(self, kv: KVSpec, heads: int, window: int | None) -> None:
        self._kv = kv
        self._heads = heads
        self._window = window

    def batches(
        self, dtype: torch.dtype, begin: int, end: int, lengths: Ints, tables: Tables
    ) -> Iterator[BlockBatch | PaddedBatch]:
        """Batches of the sequences with queries ``begin:end``; ``lengths, tables``: contexts (> 0) and block tables."""
        seen = lengths if self._window is None else np.minimum(lengths, self._window)
        values = int(seen.max()) * self._kv.kv_heads * self._kv.head_dim * dtype.itemsize
        # Only float32 products keep scores in float32; the flash kernel does so for every dtype.
        if dtype == torch.float32 and values > COPY_VALUES_BYTES:
            yield self._blocks(begin, end, lengths, tables)
            return
        for first, last in _alike(seen):
            where = (begin + first, begin + last, lengths[first:last], tables[first:last])
            in_place = dtype == torch.float32 and 2 * len(lengths) * values > COPY_BOTH_BYTES
            yield self._padded(dtype, in_place, *where)

    def matrices(self, blocks: Ints, *, keys: bool) -> torch.Tensor:
        """Matrices for :meth:`HeadMajorKVCache.copies` of ``blocks: [sequences, blocks]``, head by head."""
        heads = self._kv.kv_heads
        found = blocks[:, None, :] * heads + np.arange(heads)[None, :, None]
        values = found + (self._kv.blocks + 1) * heads
        return indices(np.stack((found, values)) if keys else values)

    def _visible(self, lengths: Ints) -> tuple[Ints, Ints, Ints]:
        """First visible key, first block and end of the blocks of each sequence."""
        low = np.zeros_like(lengths) if self._window is None else np.maximum(lengths - self._window, 0)
        return low, low // self._kv.block_size, -(-lengths // self._kv.block_size)

    def _padded(
        self, dtype: torch.dtype, keys_in_place: bool, begin: int, end: int, lengths: Ints, tables: Tables
    ) -> PaddedBatch:
        size, kv_heads, sequences = self._kv.block_size, self._kv.kv_heads, len(lengths)
        low, first, last = self._visible(lengths)
        most = int((last - first).max())
        index = np.minimum(first[:, None] + np.arange(most), (last - 1)[:, None])
        blocks = tables[np.arange(sequences)[:, None], index].astype(np.int64)
        keys = most * size
        position = first[:, None] * size + np.arange(keys)
        unseen = (position < low[:, None]) | (position >= lengths[:, None])
        sequence, key = np.nonzero(unseen)
        hidden = hidden_scores = mask = None
        if len(key):
            hidden = indices((sequence[:, None] * kv_heads + np.arange(kv_heads)) * keys + key[:, None])
            if dtype == torch.float32:
                hidden_scores = indices(
                    (sequence[:, None] * self._heads + np.arange(self._heads)) * keys + key[:, None]
                )
            else:
                mask = torch.zeros((sequences, 1, 1, keys), dtype=dtype)
                mask.view(sequences, keys).masked_fill_(torch.from_numpy(unseen), -torch.inf)
        in_place = self._keys_in_place(blocks, last - first) if keys_in_place else None
        return PaddedBatch(
            begin=begin,
            end=end,
            keys=keys,
            in_place=in_place,
            matrices=self.matrices(blocks, keys=in_place is None),
            hidden=hidden,
            hidden_scores=hidden_scores,
            mask=mask,
        )

    def _keys_in_place(self, blocks: Ints, counts: Ints) -> KeysInPlace | None:
        own = blocks[np.arange(blocks.shape[1]) < counts[:, None]]
        lowest, span = _range(own)
        if not span:
            return None
        owner = np.zeros(span, dtype=np.int64)
        owner[own - lowest] = np.repeat(np.arange(len(counts)), counts)
        heads = self._kv.kv_heads
        order = (blocks - lowest)[:, None, :] * heads + np.arange(heads)[None, :, None]
        return KeysInPlace(first=lowest, blocks=span, owner=indices(owner), order=indices(order))

    def _blocks(self, begin: int, end: int, lengths: Ints, tables: Tables) -> BlockBatch:
        size, sequences = self._kv.block_size, len(lengths)
        low, first, last = self._visible(lengths)
        counts = last - first
        owner = np.repeat(np.arange(sequences), counts)
        nth = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
        index = first[owner] + nth
        blocks = tables[owner, index].astype(np.int64)
        lowest, span = _range(blocks)
        most = int(counts.max())
        place = blocks - lowest if span else np.arange(len(blocks))
        total = span or len(blocks)
        owners = np.zeros(total, dtype=np.int64)
        owners[place] = owner
        columns = np.minimum(np.arange(most), counts[:, None] - 1)
        places = place[(np.cumsum(counts) - counts)[:, None] + columns]
        natural = bool(np.array_equal(places.reshape(-1), np.arange(total)))
        start = np.maximum(low[owner] - index * size, 0)
        stop = np.minimum(lengths[owner] - index * size, size)
        return BlockBatch(
            begin=begin,
            end=end,
            blocks=total,
            first=lowest if span else None,
            gather=None if span else indices(blocks),
            owner=indices(owners),
            places=None if natural else indices(places),
            own=indices(place),
            bags=indices(np.cumsum(counts) - counts),
            most=most,
            edges=self._edges(place, blocks, start, stop),
        )

    def _edges(self, place: Ints, blocks: Ints, start: Ints, stop: Ints) -> Edges | None:
        size, kv_heads = self._kv.block_size, self._kv.kv_heads
        partly = np.flatnonzero((start > 0) | (stop < size))
        if not len(partly):
            return None
        place, blocks, start, stop = place[partly], blocks[partly], start[partly], stop[partly]
        offsets, heads = np.arange(size), np.arange(kv_heads)
        edge, offset = np.nonzero((offsets < start[:, None]) | (offsets >= stop[:, None]))
        rows = place[edge][:, None] * self._heads + np.arange(self._heads)
        visible = np.clip(offsets[None, :], start[:, None], stop[:, None] - 1)
        return Edges(
            scores=indices(rows * size + offset[:, None]),
            blocks=indices(place[:, None] * kv_heads + heads),
            value_rows=indices((blocks[:, None, None] * kv_heads + heads[:, None]) * size + visible[:, None, :]),
        )


def indices(array: Ints) -> torch.Tensor:
    """The array as a flat tensor of its own."""
    return torch.from_numpy(np.ascontiguousarray(array.reshape(-1), dtype=np.int64))


def _alike(lengths: Ints) -> Iterator[tuple[int, int]]:
    """Runs of sequences whose lengths are so alike that padding at most doubles them."""
    if len(lengths) * int(lengths.max()) <= 2 * int(lengths.sum()):
        yield 0, len(lengths)
        return
    first, longest, total = 0, 0, 0
    for i, length in enumerate(lengths.tolist()):
        if i > first and (i + 1 - first) * max(longest, length) > 2 * (total + length):
            yield first, i
            first, longest, total = i, 0, 0
        longest, total = max(longest, length), total + length
    yield first, len(lengths)


def _range(blocks: Ints) -> tuple[int, int]:
    """Lowest block, and how many there are up to the highest; (0, 0) if many are others' or some are named twice."""
    lowest, span = int(blocks.min()), int(blocks.max() - blocks.min()) + 1
    if span > len(blocks) * (1 + IDLE_SHARE) + 1 or len(np.unique(blocks)) < len(blocks):
        return 0, 0
    return lowest, span
