"""Embedding rows with adapters, and the rank rows of triples (``sgmv_shrink``, ``sgmv_expand``)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from polyaccel_cuda.kernels.delta import RANK_BLOCK, add_delta, last_unit, read_unit, segment
from polyaccel_cuda.kernels.rows import Units, pointers


@triton.jit
def embedding_kernel(table, ids, out, rows, hidden, vocabulary_start, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    local = tl.load(ids + row) - vocabulary_start
    known = (local >= 0) & (local < rows)
    x = tl.load(table + tl.where(known, local, 0) * hidden + columns, mask=(columns < hidden) & known, other=0.0)
    tl.store(out + row * hidden + columns, x, mask=columns < hidden)


@triton.jit
def adapted_embedding_kernel(
    table,
    ids,
    out,
    rows,
    hidden,
    vocabulary_start,
    h,
    h_stride,
    b,
    seats,
    members,
    first,
    place,
    rank,
    mix,
    more,
    LOOP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < hidden
    live = tl.load(seats)
    for unit in range(tl.program_id(0), last_unit(tl.program_id(0), live, LOOP), tl.num_programs(0)):
        # A table's rank rows are where the store has them, whatever a product left out.
        member, low, left, high, weight, begin, end_more = read_unit(unit, members, first, first, rank, mix, more, ROWS)
        if unit < live:
            present = member >= 0
            tokens = tl.where(present, member, 0).to(tl.int64)
            local = tl.load(ids + tokens, mask=present, other=0) - vocabulary_start
            known = present & (local >= 0) & (local < rows)
            local = tl.where(known, local, 0)
            mask = known[:, None] & inside[None, :]
            x = tl.load(table + local[:, None] * hidden + columns[None, :], mask=mask, other=0.0).to(tl.float32)
            # Ids of other ranks read the first row, and what they add is dropped.
            hp = h + local * h_stride
            y = add_delta(x, low, left, high, weight, hp, 1, b, hidden, columns, inside, ROWS, BLOCK_R)
            for extra in range(begin, end_more):
                low, left, high, weight = segment(extra, first, first, rank, mix, ROWS, ROWS)
                y = add_delta(y, low, left, high, weight, hp, 1, b, hidden, columns, inside, ROWS, BLOCK_R)
            y = tl.where(known[:, None], y, 0.0)
            where = out + tokens[:, None] * hidden + columns[None, :]
            tl.store(where, y.to(out.dtype.element_ty), mask=present[:, None] & inside[None, :])


def embedding(
    table: torch.Tensor,
    ids: torch.Tensor,
    vocabulary_start: int,
    h: torch.Tensor | None = None,
    units: Units | None = None,
) -> torch.Tensor:
    """``[T, hidden]`` from ``table: [rows, hidden]`` dense and ``ids: [T]`` int64; ``h: [rows, rank rows]`` is A.T."""
    rows, hidden = table.shape
    tokens = len(ids)
    out = torch.empty((tokens, hidden), dtype=table.dtype, device=table.device)
    if not out.numel():
        return out
    if h is None or units is None or not rows:
        block = min(1024, triton.next_power_of_2(hidden))
        embedding_kernel[(tokens, triton.cdiv(hidden, block))](
            table, ids, out, rows, hidden, vocabulary_start, BLOCK=block
        )
        return out
    block = min(64, max(16, triton.next_power_of_2(hidden)))
    blocks = triton.cdiv(hidden, block)
    lanes, loop = units.lanes(blocks)
    adapted_embedding_kernel[(lanes, blocks)](
        table,
        ids,
        out,
        rows,
        hidden,
        vocabulary_start,
        *pointers(h, units),
        LOOP=loop,
        ROWS=units.rows,
        BLOCK=block,
        BLOCK_R=RANK_BLOCK,
    )
    return out


@triton.jit
def take_rank_rows_kernel(u, u_stride, rows, slots, spans, ranks, ranks_stride, h, slices, width, BLOCK: tl.constexpr):
    triple = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + triple)
    slot = tl.load(slots + triple)
    first = tl.load(spans + 2 * slot)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    part, r = index // width, index % width
    inside = index < slices * width
    # Beyond a slice's own rank A is zero, which times NaN is none.
    count = tl.load(ranks + slot * ranks_stride + part, mask=inside, other=0)
    value = tl.load(u + row * u_stride + (first + r) * slices + part, mask=inside & (r < count), other=0.0)
    tl.store(h + triple * slices * width + index, value, mask=inside)


def take_rank_rows(
    u: torch.Tensor,
    rows: torch.Tensor,
    slots: torch.Tensor,
    spans: torch.Tensor,
    ranks: torch.Tensor,
    width: int,
) -> torch.Tensor:
    """``h: [triples, slices, width]`` from ``u: [T, rank rows * slices]``; ``rows, slots: [triples]`` int64, ``spans:
    [slots, 2]`` int32, first rank row and count, and ``ranks: [slots, slices]`` int32, true ranks of the site."""
    slices = ranks.shape[1]
    h = torch.empty((len(rows), slices, width), dtype=u.dtype, device=u.device)
    if h.numel():
        block = min(256, triton.next_power_of_2(slices * width))
        take_rank_rows_kernel[(len(rows), triton.cdiv(slices * width, block))](
            u, u.stride(0), rows, slots, spans, ranks, ranks.stride(0), h, slices, width, BLOCK=block
        )
    return h


@triton.jit
def expand_triples_kernel(
    y,
    y_stride,
    h,
    b,
    n,
    begin,
    end,
    part,
    slices,
    width,
    row_starts,
    order,
    slots,
    spans,
    ranks,
    ranks_stride,
    weights,
    BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = begin + tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < end
    low, high = tl.load(row_starts + row), tl.load(row_starts + row + 1)
    if low < high:
        acc = tl.load(y + row * y_stride + columns, mask=inside, other=0.0).to(tl.float32)
        for i in range(low, high):
            triple = tl.load(order + i).to(tl.int64)
            slot = tl.load(slots + triple)
            top = tl.load(spans + 2 * slot)
            # Beyond a slice's own rank h may hold anything.
            count = tl.minimum(tl.load(ranks + slot * ranks_stride + part), width)
            delta = tl.zeros_like(acc)
            for r in range(0, count, BLOCK_R):
                index = r + tl.arange(0, BLOCK_R)
                known = index < count
                hr = tl.load(h + (triple * slices + part) * width + index, mask=known, other=0.0).to(tl.float32)
                where = b + (top + index).to(tl.int64)[:, None] * n + columns[None, :]
                br = tl.load(where, mask=known[:, None] & inside[None, :], other=0.0).to(tl.float32)
                delta += tl.sum(hr[:, None] * br, 0)
            acc += tl.load(weights + triple) * delta
        tl.store(y + row * y_stride + columns, acc.to(y.dtype.element_ty), mask=inside)


class Triples(NamedTuple):
    """A row set's triples as the step gives them, and by row.

    Attributes:
        row_starts: ``[rows + 1]`` int32; order: ``[triples]`` int32, which triple is the i-th in order of row.
        slots: ``[triples]`` int64; weights: ``[triples]`` float32.
        spans: ``[slots, 2]`` int32, first rank row and count; ranks: ``[slots, slices]`` int32, true ranks of a site.
    """

    row_starts: torch.Tensor
    order: torch.Tensor
    slots: torch.Tensor
    weights: torch.Tensor
    spans: torch.Tensor
    ranks: torch.Tensor


def expand_triples(
    y: torch.Tensor, h: torch.Tensor, starts: tuple[int, ...], b: torch.Tensor, triples: Triples
) -> torch.Tensor:
    """Add ``mix * h @ B.T`` of every triple to ``y: [T, n]`` in place; ``h: [triples, slices, width]`` and ``b: [rank
    rows, n]`` dense."""
    for i in range(len(starts) - 1):
        columns = starts[i + 1] - starts[i]
        if not columns or not y.shape[0]:
            continue
        block = min(256, triton.next_power_of_2(columns))
        expand_triples_kernel[(y.shape[0], triton.cdiv(columns, block))](
            y,
            y.stride(0),
            h,
            b,
            starts[-1],
            starts[i],
            starts[i + 1],
            i,
            h.shape[1],
            h.shape[2],
            triples.row_starts,
            triples.order,
            triples.slots,
            triples.spans,
            triples.ranks,
            triples.ranks.stride(0),
            triples.weights,
            BLOCK=block,
            BLOCK_R=16,
        )
    return y
