"""How sequences with one query each are attended together.

Copied: keys and values of all sequences padded to one length, one batched product each: the fewest passes, for what
fits in a core's own cache. Keys in place: a block is one matrix a head, so the scores of all blocks are one batched
product without a copy of keys. Values in place: each head's output is a weighted sum of rows of the cache. Measured,
see docs/cpu.md.
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
class KeysInPlace:
    """Consecutive cache blocks ``first:first + blocks`` whose keys are multiplied where they are.

    Attributes:
        owner: ``[blocks]`` int64, the sequence that a block belongs to.
        order: ``[sequences * heads * blocks of a sequence]`` int64, where the padded order finds its (block, head).
    """

    first: int
    blocks: int
    owner: torch.Tensor
    order: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ValuesInPlace:
    """Values that are summed where they are.

    Attributes:
        rows: ``[sequences * heads * keys]`` int64 rows of the cache's values; a visible one for each hidden.
        bags: ``[sequences * heads]`` int64, where each head's begin.
    """

    rows: torch.Tensor
    bags: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DecodeBatch:
    """Queries ``begin:end``, one of each of some sequences, over their keys padded to one length.

    Attributes:
        keys: padded length.
        keys_in_place, values_in_place: where they are, None if they are copied.
        matrices: one for each head of each block to copy (:meth:`HeadMajorKVCache.copies`): keys, then values.
        hidden: flat rows ``(sequence, key head, key)`` int64 of copied values that must not be read; None if there are
            none.
        hidden_scores: flat ``(sequence, head, key)`` int64 of the same, and mask: ``[sequences, 1, 1, keys]``, minus
            infinity there; the one that the dtype's product needs.
    """

    begin: int
    end: int
    keys: int
    keys_in_place: KeysInPlace | None
    values_in_place: ValuesInPlace | None
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

    def batches(self, dtype: torch.dtype, begin: int, end: int, lengths: Ints, tables: Tables) -> Iterator[DecodeBatch]:
        """Batches of the sequences with queries ``begin:end``; ``lengths, tables``: contexts (> 0) and block tables."""
        seen = lengths if self._window is None else np.minimum(lengths, self._window)
        values = int(seen.max()) * self._kv.kv_heads * self._kv.head_dim * dtype.itemsize
        # Only float32 products keep scores in float32; the flash kernel does so for every dtype.
        copied = dtype != torch.float32
        keys_in_place = not copied and 2 * len(lengths) * values > COPY_BOTH_BYTES
        values_in_place = not copied and values > COPY_VALUES_BYTES
        for first, last in _alike(seen):
            where = (begin + first, begin + last, lengths[first:last], tables[first:last])
            yield self._batch(dtype, keys_in_place, values_in_place, *where)

    def matrices(self, blocks: Ints, *, keys: bool = True, values: bool = True) -> torch.Tensor:
        """Matrices for :meth:`HeadMajorKVCache.copies` of ``blocks: [sequences, blocks]``, head by head."""
        heads = self._kv.kv_heads
        found = blocks[:, None, :] * heads + np.arange(heads)[None, :, None]
        parts = [found] * keys + [found + (self._kv.blocks + 1) * heads] * values
        return indices(np.stack(parts)) if parts else torch.empty(0, dtype=torch.int64)

    def _visible(self, lengths: Ints) -> tuple[Ints, Ints, Ints]:
        """First visible key, first block and end of the blocks of each sequence."""
        low = np.zeros_like(lengths) if self._window is None else np.maximum(lengths - self._window, 0)
        return low, low // self._kv.block_size, -(-lengths // self._kv.block_size)

    def _batch(
        self,
        dtype: torch.dtype,
        keys_in_place: bool,
        values_in_place: bool,
        begin: int,
        end: int,
        lengths: Ints,
        tables: Tables,
    ) -> DecodeBatch:
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
            if not values_in_place:
                hidden = indices((sequence[:, None] * kv_heads + np.arange(kv_heads)) * keys + key[:, None])
            if dtype == torch.float32:
                hidden_scores = indices(
                    (sequence[:, None] * self._heads + np.arange(self._heads)) * keys + key[:, None]
                )
            else:
                mask = torch.zeros((sequences, 1, 1, keys), dtype=dtype)
                mask.view(sequences, keys).masked_fill_(torch.from_numpy(unseen), -torch.inf)
        owned = self._keys_in_place(blocks, last - first) if keys_in_place else None
        summed = None
        if values_in_place:
            # A hidden infinity times a probability of 0 would be NaN.
            seen = np.clip(position, low[:, None], lengths[:, None] - 1) - first[:, None] * size
            summed = self._values_in_place(blocks, seen)
        return DecodeBatch(
            begin=begin,
            end=end,
            keys=keys,
            keys_in_place=owned,
            values_in_place=summed,
            matrices=self.matrices(blocks, keys=owned is None, values=not values_in_place),
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
        order = (blocks - lowest)[:, None, :] * self._heads + np.arange(self._heads)[None, :, None]
        return KeysInPlace(first=lowest, blocks=span, owner=indices(owner), order=indices(order))

    def _values_in_place(self, blocks: Ints, seen: Ints) -> ValuesInPlace:
        """Values at the places ``seen: [sequences, keys]`` of each sequence's ``blocks: [sequences, most]``."""
        size, kv_heads = self._kv.block_size, self._kv.kv_heads
        sequences, keys = seen.shape
        block = np.take_along_axis(blocks, seen // size, axis=1)[:, None] * kv_heads + np.arange(kv_heads)[:, None]
        rows = block * size + (seen % size)[:, None]
        shape = (sequences, kv_heads, self._heads // kv_heads, keys)
        return ValuesInPlace(
            rows=indices(np.broadcast_to(rows[:, :, None], shape)),
            bags=torch.arange(0, sequences * self._heads * keys, keys),
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
