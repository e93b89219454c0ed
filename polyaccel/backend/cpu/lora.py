"""Adapters on linear layers by batches of segments (Punica, arXiv 2310.18547; S-LoRA, arXiv 2311.03285).

Products accumulate in float32; h is kept in x's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from polyaccel.backend.composite.tiles import whole_tiles
from polyaccel.backend.cpu.lora_plan import Batch


def delta(x: torch.Tensor, batches: Sequence[Batch]) -> torch.Tensor:
    """What the batches, all of single rows, add to y: ``[T, n]`` for contiguous ``x: [T, k]``; a new tensor."""
    if len(batches) == 1 and batches[0].covers(x.shape[0]):
        return _expand_rows(x, batches[0])
    out = x.new_zeros((x.shape[0], batches[0].matrices.n))
    for batch in batches:
        if batch.index is None:
            out[batch.run].add_(_expand_rows(x, batch))
        else:
            # A row with several adapters appears several times.
            out.index_add_(0, batch.index, _expand_rows(x, batch))
    return out


def add_adapters(y: torch.Tensor, x: torch.Tensor, batches: Sequence[Batch]) -> torch.Tensor:
    """Add every batch's delta to ``y: [T, n]`` (rows dense), in place; ``x: [T, k]`` contiguous. Returns y.

    y is rounded once a row, given that no row of a narrower y has several adapters (:attr:`AdapterPlan.single`).
    """
    for batch in batches:
        if batch.rows == 1:
            _add_rows(y, x, batch)
        else:
            _add_segments(y, x, batch)
    return y


def _add_rows(y: torch.Tensor, x: torch.Tensor, batch: Batch) -> None:
    if y.dtype == torch.float32:
        if batch.index is None:
            y[batch.run].add_(_expand_rows(x, batch))
        else:
            y.index_add_(0, batch.index, _expand_rows(x, batch))
        return
    # The sum is formed before it leaves float32.
    h, b = _shrink_rows(x, batch)
    if batch.index is None and not y.is_contiguous():
        _add_by_chunk(y[batch.run], h, b, batch)
        return
    old = y[batch.run] if batch.index is None else y.index_select(0, batch.index)
    new = torch.baddbmm(old.reshape(len(b), 1, -1), h, b).view(old.shape)
    if batch.index is None:
        y[batch.run] = new
    else:
        y.index_copy_(0, batch.index, new)


def _add_by_chunk(y: torch.Tensor, h: torch.Tensor, b: torch.Tensor, batch: Batch) -> None:
    """The same for rows with gaps between them, whose chunks are no batch: a product each instead of a copy of y."""
    matrices, segments = batch.matrices, batch.segments
    chunks = y.view(segments, matrices.chunks, matrices.width)
    h, b = h.view(segments, matrices.chunks, 1, -1), b.view(segments, matrices.chunks, -1, matrices.width)
    for chunk in range(matrices.chunks):
        target = chunks[:, chunk : chunk + 1]
        target.copy_(torch.baddbmm(target, h[:, chunk], b[:, chunk]))


def _add_segments(y: torch.Tensor, x: torch.Tensor, batch: Batch) -> None:
    matrices, rank, width = batch.matrices, batch.rank, batch.matrices.width
    rows = x[batch.run] if batch.index is None else x.index_select(0, batch.index)
    h = torch.bmm(*whole_tiles(rows.view(batch.segments, batch.rows, x.shape[1]), batch.a, axis=-2))
    if batch.mix is not None:
        h.mul_(batch.mix)
    b = batch.b.view(batch.segments, matrices.chunks, rank, width)
    for index, (start, end) in enumerate(pairwise(matrices.starts)):
        own = h[:, :, index * rank : (index + 1) * rank]
        # The chunks of a slice side by side: a copy of B, which has far fewer rows than x.
        joined = b[:, start:end].transpose(1, 2).reshape(batch.segments, rank, (end - start) * width)
        _add_slice(y[:, start * width : end * width], own, joined, batch)


def _add_slice(y: torch.Tensor, h: torch.Tensor, b: torch.Tensor, batch: Batch) -> None:
    """Add ``h @ b`` for ``h: [segments, rows, rank]`` and ``b: [segments, rank, n]`` to the batch's rows of y."""
    h, b = whole_tiles(h, b, axis=-2)
    if batch.index is not None:
        if y.dtype == torch.float32:
            y.index_add_(0, batch.index, torch.bmm(h, b).flatten(0, 1))
        else:
            old = y.index_select(0, batch.index).view(batch.segments, batch.rows, -1)
            y.index_copy_(0, batch.index, torch.baddbmm(old, h, b).flatten(0, 1))
        return
    target = y[batch.run]
    if batch.segments == 1:
        target.addmm_(h[0], b[0])
    else:
        grouped = target.view(batch.segments, batch.rows, -1)
        grouped.copy_(torch.baddbmm(grouped, h, b))


def _expand_rows(x: torch.Tensor, batch: Batch) -> torch.Tensor:
    """``[segments, n]``: the delta of each of the batch's single rows."""
    return torch.bmm(*_shrink_rows(x, batch)).view(batch.segments, batch.matrices.n)


def _shrink_rows(x: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """h, repeated for each chunk of its slice, ``[segments * chunks, 1, rank]``, and the B that goes with it."""
    matrices, segments, rank = batch.matrices, batch.segments, batch.rank
    if batch.index is not None:
        x = x.index_select(0, batch.index)
    elif not batch.covers(x.shape[0]):
        x = x[batch.run]
    a, b = batch.a, batch.b
    if batch.gather is not None:
        gather = batch.gather
        a = matrices.a.view(matrices.slices * matrices.rank_rows, matrices.k).index_select(0, gather.a)
        a = a.view(segments, matrices.slices * rank, matrices.k).transpose(1, 2)
        b = matrices.b.view(-1, matrices.width).index_select(0, gather.b)
        b = b.view(segments * matrices.chunks, rank, matrices.width)
    h = torch.bmm(x.unsqueeze(1), a)
    if batch.gather is not None:
        h.mul_(batch.gather.keep)
    if batch.mix is not None:
        h.mul_(batch.mix)
    h = h.view(segments, matrices.slices, rank)
    if matrices.chunk_slices is not None:
        h = h.index_select(1, matrices.chunk_slices)
    return h.view(segments * matrices.chunks, 1, rank), b
