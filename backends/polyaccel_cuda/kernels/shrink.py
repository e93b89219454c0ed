"""The shrink of a prefill's rows, each with the A rows of its own adapters alone: cost flat in how many are loaded."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from polyaccel_cuda.kernels import tiling
from polyaccel_cuda.kernels.rows import Units


@triton.jit
def _shrink_segment(
    x_at,
    matrix,
    to,
    to_stride,
    rows,
    present,
    k,
    begin,
    end,
    stride,
    slices,
    block,
    first,
    place,
    rank,
    i,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Rank rows of one segment: those of the ``block`` of columns, over k from ``begin`` to ``end``."""
    total = tl.load(rank + i) * slices
    if block * BLOCK_N < total:
        low, left = tl.load(first + i).to(tl.int64), tl.load(place + i).to(tl.int64)
        column = block * BLOCK_N + tl.arange(0, BLOCK_N)
        known = column < total
        index = tl.arange(0, BLOCK_K)
        # What lies beyond is some row of the matrix, read and dropped.
        a_at = matrix + (low * slices + tl.where(known, column, 0))[None, :] * stride + index[:, None]
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for at in range(begin, end, BLOCK_K):
            if EVEN:
                xs = tl.load(x_at + at + index[None, :])
                a = tl.load(a_at + at)
            else:
                inside = at + index < end
                xs = tl.load(x_at + at + index[None, :], mask=inside[None, :], other=0.0)
                a = tl.load(a_at + at, mask=inside[:, None], other=0.0)
            acc = tl.dot(xs, a, acc, input_precision="ieee")
        where = to + rows[:, None] * to_stride + (left * slices + column)[None, :]
        tl.store(where, acc.to(to.dtype.element_ty), mask=present[:, None] & known[None, :])


@triton.jit
def shrink_kernel(
    x,
    matrix,
    to,
    x_stride,
    stride,
    to_stride,
    plane,
    k,
    share,
    slices,
    members,
    first,
    place,
    rank,
    more,
    MIXED: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    block, tile, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    unit = tile // (ROWS // BLOCK_M)
    seat = tile % (ROWS // BLOCK_M) * BLOCK_M + tl.arange(0, BLOCK_M)
    member = tl.load(members + unit * ROWS + seat)
    present = member >= 0
    rows = tl.where(present, member, 0).to(tl.int64)
    begin = split * share
    end = tl.minimum(begin + share, k)
    to += split.to(tl.int64) * plane
    x_at = x + rows[:, None] * x_stride
    if tl.max(member, 0) >= 0:
        _shrink_segment(
            x_at, matrix, to, to_stride, rows, present, k, begin, end, stride, slices, block, first, place, rank,
            unit, EVEN, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        if MIXED:
            for extra in range(tl.load(more + unit), tl.load(more + unit + 1)):
                _shrink_segment(
                    x_at, matrix, to, to_stride, rows, present, k, begin, end, stride, slices, block, first, place,
                    rank, extra, EVEN, BLOCK_M, BLOCK_N, BLOCK_K,
                )  # fmt: skip


@triton.jit
def sum_planes_kernel(planes, h, total, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < total
    acc = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(SPLITS):
        acc += tl.load(planes + i * total + index, mask=inside, other=0.0)
    tl.store(h + index, acc.to(h.dtype.element_ty), mask=inside)


def shrink(
    x: torch.Tensor, matrix: torch.Tensor, slices: int, width: int, units: Units, share: tiling.Share | None = None
) -> torch.Tensor:
    """``h: [T, width * slices]``: in each row, one after the other, the rank rows of the row's own segments.

    Rank row r of slice s of a segment is column ``(place + r) * slices + s``; columns that no segment of the row has
    hold anything. Splits of k are summed in float32 in one order: the same bits whenever there are as many units.

    Args:
        x: ``[T, k]``, rows dense.
        matrix: ``[rank rows * slices, k]``, rows dense, slices innermost.
        width: the most rank rows that a row's segments have together.
        units: of a prefill, places counted within each row.
    """
    share = tiling.SHRINK if share is None else share
    tokens, k = x.shape
    columns = width * slices
    h = torch.empty((tokens, columns), dtype=x.dtype, device=x.device)
    if not h.numel() or not units.most:
        return h
    block_m = min(share.rows, units.rows)
    deepest = max(1, units.largest) * slices
    block_n = min(share.columns, max(16, triton.next_power_of_2(deepest)))
    if x.dtype == torch.float32:
        block_n = min(block_n, tiling.WIDE_COLUMNS)
    block_k = min(share.k, max(16, triton.next_power_of_2(k)))
    tiles, blocks = units.most * (units.rows // block_m), triton.cdiv(deepest, block_n)
    steps = triton.cdiv(k, block_k)
    splits = max(1, min(share.most, share.programs // (tiles * blocks), steps // 4))
    each = triton.cdiv(steps, splits) * block_k
    splits = max(1, triton.cdiv(k, each))
    to = h if splits == 1 else torch.empty((splits, tokens, columns), dtype=torch.float32, device=x.device)
    shrink_kernel[(blocks, tiles, splits)](
        x,
        matrix,
        to,
        x.stride(0),
        matrix.stride(0),
        columns,
        tokens * columns,
        k,
        each,
        slices,
        units.members,
        units.first,
        units.place,
        units.rank,
        units.more,
        MIXED=units.mixed,
        EVEN=k % block_k == 0,
        ROWS=units.rows,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=share.warps,
        num_stages=share.stages if x.dtype != torch.float32 else 2,
    )
    if splits > 1:
        total = tokens * columns
        sum_planes_kernel[(triton.cdiv(total, 1024),)](to, h, total, SPLITS=splits, BLOCK=1024)
    return h
