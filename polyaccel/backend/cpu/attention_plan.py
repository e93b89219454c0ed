"""Which cache blocks a step's queries read, worked out on the host once for all layers.

Sequences with one query each are decoded together. Short contexts are copied, padded to equal length. Long ones are
multiplied block by block where they are: a block is one matrix a head, so the scores of all blocks of all sequences are
one batched product, and so are the sums over values. Scattered or shared blocks are gathered first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from polyaccel.backend.kv_cache import KVSpec
from polyaccel.backend.step import StepInput

# Keys and values that are copied to be padded rather than multiplied in place: fewer passes over the scores are worth
# more as long as the copies stay in the processor's caches. Measured, see docs/cpu.md.
COPY_BYTES = 4 << 20
# Blocks of others that may lie between a batch's own before copying its own is cheaper: a share of them.
IDLE_SHARE = 0.25

Ints = npt.NDArray[np.int64]


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
class DecodeBatch:
    """Queries ``begin:end``, one of each of ``sequences`` sequences, over ``blocks`` cache blocks.

    Attributes:
        first: the first of consecutive cache blocks, or None where ``gather: [blocks]`` int64 lists them.
        owner: ``[blocks]`` int64, the sequence that a block belongs to.
        places: ``[sequences * most]`` int64, each sequence's blocks, the last one repeated as padding; None where the
            blocks are in order of sequence and equally many.
        padding: places that are padding, int64; None if there are none.
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
    padding: torch.Tensor | None
    most: int
    edges: Edges | None

    @property
    def sequences(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PaddedBatch:
    """The same queries over copies ``[sequences, kv_heads, keys]`` of their blocks, padded to equal length.

    Attributes:
        keys: padded length.
        chunks: ``[2 * sequences * kv_heads * blocks]`` int64, which (block, head) matrices to copy: keys, then values.
        hidden: flat rows ``(sequence, key head, key)`` int64 that must not be read; None if there are none.
        hidden_scores: flat ``(sequence, head, key)`` int64 of the same, and mask: ``[sequences, 1, 1, keys]``, minus
            infinity there; the one that the dtype's product needs.
    """

    begin: int
    end: int
    keys: int
    chunks: torch.Tensor
    hidden: torch.Tensor | None
    hidden_scores: torch.Tensor | None
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prefill:
    """Queries ``begin:end``, equally many of each of ``sequences`` sequences: the last ones of ``keys`` keys.

    Blocks of keys that no query sees are left out. ``chunks``: ``[2 * sequences * kv_heads * blocks]`` int64, the
    (block, head) matrices of the keys, then those of the values.
    """

    begin: int
    end: int
    sequences: int
    keys: int
    chunks: torch.Tensor

    @property
    def queries(self) -> int:
        """Of each sequence."""
        return (self.end - self.begin) // self.sequences


@dataclass(slots=True)
class _Run:
    """Consecutive sequences with equally many queries and keys."""

    begin: int
    end: int
    context: int
    tables: list[npt.NDArray[np.int32]]

    def takes(self, begin: int, end: int, context: int) -> bool:
        queries = (self.end - self.begin) // len(self.tables)
        return begin == self.end and end - begin == queries and context == self.context


class AttentionPlan:
    """The pieces of one ragged attention call.

    Attributes:
        tokens: rows of q.
        covered: no row is left out of the pieces.
    """

    def __init__(self, tokens: int, kv: KVSpec, heads: int, window: int | None) -> None:
        self.tokens = tokens
        self.window = window
        self.prefills: list[Prefill] = []
        self._decodes: list[tuple[int, int, Ints, npt.NDArray[np.int32]]] = []
        self._kv = kv
        self._group = heads // max(1, kv.kv_heads)
        self._batches: dict[torch.dtype, tuple[DecodeBatch | PaddedBatch, ...]] = {}
        self._masks: dict[tuple[int, torch.dtype], torch.Tensor] = {}
        self.covered = False

    @classmethod
    def of(cls, inputs: StepInput, kv: KVSpec, heads: int, window: int | None) -> AttentionPlan:
        plan = cls(inputs.tokens, kv, heads, window)
        starts, contexts = inputs.query_starts.tolist(), inputs.context_lengths.tolist()
        covered = 0
        run: _Run | None = None
        for first, last in _runs(starts, contexts):
            begin, end, context = starts[first], starts[last], contexts[first]
            if context == 0:
                continue
            if end - begin == last - first:
                lengths = inputs.context_lengths[first:last].astype(np.int64)
                plan._decodes.append((begin, end, lengths, inputs.block_tables[first:last]))
                covered += end - begin
            elif end > begin:
                # Queries before the first key see nothing.
                begin += max(0, end - begin - context)
                table = inputs.block_tables[first]
                if run is not None and run.takes(begin, end, context):
                    run.end = end
                    run.tables.append(table)
                else:
                    plan._add_prefill(run)
                    run = _Run(begin, end, context, [table])
                covered += end - begin
        plan._add_prefill(run)
        plan.covered = covered == inputs.tokens
        return plan

    def decode_batches(self, dtype: torch.dtype) -> tuple[DecodeBatch | PaddedBatch, ...]:
        """The sequences of one query each, as suits queries of this dtype."""
        found = self._batches.get(dtype)
        if found is None:
            found = self._batches[dtype] = tuple(self._batch(dtype, *decode) for decode in self._decodes)
        return found

    def mask(self, rows: int, dtype: torch.dtype) -> torch.Tensor:
        """``[rows, keys]``, 0 where a query sees a key and minus infinity elsewhere.

        The last query is at the last key; for fewer queries or keys take the last ones.
        """
        key = (rows, dtype)
        found = self._masks.get(key)
        if found is None:
            keys = max(piece.keys for piece in self.prefills)
            distance = torch.arange(rows).unsqueeze(1) - torch.arange(keys) + (keys - rows)
            hidden = distance < 0
            if self.window is not None:
                hidden |= distance >= self.window
            found = self._masks[key] = torch.zeros((rows, keys), dtype=dtype).masked_fill_(hidden, -torch.inf)
        return found

    def _add_prefill(self, run: _Run | None) -> None:
        if run is None:
            return
        size, sequences = self._kv.block_size, len(run.tables)
        queries = (run.end - run.begin) // sequences
        lowest = 0 if self.window is None else max(0, run.context - queries + 1 - self.window)
        low, high = lowest // size, -(-run.context // size)
        blocks = np.stack([table[low:high] for table in run.tables]).astype(np.int64)
        piece = Prefill(
            begin=run.begin,
            end=run.end,
            sequences=sequences,
            keys=run.context - low * size,
            chunks=self._chunks(blocks),
        )
        self.prefills.append(piece)

    def _chunks(self, blocks: Ints) -> torch.Tensor:
        """Matrices for :meth:`HeadMajorKVCache.copies` of ``blocks: [sequences, blocks]``."""
        heads = self._kv.kv_heads
        keys = blocks[:, None, :] * heads + np.arange(heads)[None, :, None]
        return _tensor(np.stack((keys, keys + (self._kv.blocks + 1) * heads)))

    def _visible(self, lengths: Ints) -> tuple[Ints, Ints, Ints]:
        """First visible key, first block and end of the blocks of each sequence."""
        low = np.zeros_like(lengths) if self.window is None else np.maximum(lengths - self.window, 0)
        return low, low // self._kv.block_size, -(-lengths // self._kv.block_size)

    def _batch(
        self, dtype: torch.dtype, begin: int, end: int, lengths: Ints, tables: npt.NDArray[np.int32]
    ) -> DecodeBatch | PaddedBatch:
        keys = len(lengths) * int(lengths.max() if self.window is None else min(lengths.max(), self.window))
        copied = 2 * keys * self._kv.kv_heads * self._kv.head_dim * dtype.itemsize
        # Only float32 products keep scores in float32; the flash kernel does so for every dtype.
        if dtype == torch.float32 and copied > COPY_BYTES:
            return self._decode_batch(begin, end, lengths, tables)
        return self._padded_batch(dtype, begin, end, lengths, tables)

    def _decode_batch(self, begin: int, end: int, lengths: Ints, tables: npt.NDArray[np.int32]) -> DecodeBatch:
        size, sequences = self._kv.block_size, len(lengths)
        low, first, last = self._visible(lengths)
        counts = last - first
        owner = np.repeat(np.arange(sequences), counts)
        nth = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
        index = first[owner] + nth
        blocks = tables[owner, index].astype(np.int64)
        lowest, span = int(blocks.min()), int(blocks.max() - blocks.min()) + 1
        in_place = span <= len(blocks) * (1 + IDLE_SHARE) + 1 and len(np.unique(blocks)) == len(blocks)
        most = int(counts.max())
        place = blocks - lowest if in_place else np.arange(len(blocks))
        total = span if in_place else len(blocks)
        owners = np.zeros(total, dtype=np.int64)
        owners[place] = owner
        columns = np.minimum(np.arange(most), counts[:, None] - 1)
        places = place[(np.cumsum(counts) - counts)[:, None] + columns]
        padding = np.flatnonzero(np.arange(most) >= counts[:, None])
        natural = bool(np.array_equal(places.reshape(-1), np.arange(total)))
        start = np.maximum(low[owner] - index * size, 0)
        stop = np.minimum(lengths[owner] - index * size, size)
        return DecodeBatch(
            begin=begin,
            end=end,
            blocks=total,
            first=lowest if in_place else None,
            gather=None if in_place else _tensor(blocks),
            owner=_tensor(owners),
            places=None if natural else _tensor(places),
            padding=_tensor(padding) if len(padding) else None,
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
        rows = place[edge][:, None] * (kv_heads * self._group) + np.arange(kv_heads * self._group)
        visible = np.clip(offsets[None, :], start[:, None], stop[:, None] - 1)
        return Edges(
            scores=_tensor(rows * size + offset[:, None]),
            blocks=_tensor(place[:, None] * kv_heads + heads),
            value_rows=_tensor((blocks[:, None, None] * kv_heads + heads[:, None]) * size + visible[:, None, :]),
        )

    def _padded_batch(
        self, dtype: torch.dtype, begin: int, end: int, lengths: Ints, tables: npt.NDArray[np.int32]
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
            hidden = _tensor((sequence[:, None] * kv_heads + np.arange(kv_heads)) * keys + key[:, None])
            if dtype == torch.float32:
                heads = kv_heads * self._group
                hidden_scores = _tensor((sequence[:, None] * heads + np.arange(heads)) * keys + key[:, None])
            else:
                mask = torch.zeros((sequences, 1, 1, keys), dtype=dtype)
                mask.view(sequences, keys).masked_fill_(torch.from_numpy(unseen), -torch.inf)
        return PaddedBatch(
            begin=begin,
            end=end,
            keys=keys,
            chunks=self._chunks(blocks),
            hidden=hidden,
            hidden_scores=hidden_scores,
            mask=mask,
        )


def _runs(starts: list[int], contexts: list[int]) -> Iterator[tuple[int, int]]:
    """Sequences ``first:last``: maximal runs of one token each and some context, all others alone."""
    first, count = 0, len(starts) - 1

    def single(i: int) -> bool:
        return starts[i + 1] - starts[i] == 1 and contexts[i] > 0

    while first < count:
        last = first + 1
        if single(first):
            while last < count and single(last):
                last += 1
        yield first, last
        first = last


def _tensor(array: Ints) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array.reshape(-1), dtype=np.int64))
