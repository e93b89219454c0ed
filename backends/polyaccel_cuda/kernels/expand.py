"""``y + residual + adapters``: the expand of a row-parallel layer, of lm_head and of ``sgmv``."""

from __future__ import annotations

from itertools import pairwise

import torch
import triton
import triton.language as tl

from polyaccel_cuda.kernels import tiling
from polyaccel_cuda.kernels.delta import (
    RANK_BLOCK,
    add_delta,
    add_tile,
    last_unit,
    read_unit,
    segment,
    streamed,
    tile_rows,
)
from polyaccel_cuda.kernels.early import early, follow, lets_at_once
from polyaccel_cuda.kernels.lone import lone_delta, lone_segment, lone_unit, some_of_b
from polyaccel_cuda.kernels.rows import Units, pointers

BLOCK, WARPS = 64, 4
# Where each row has programs of its own. Measured, see docs/cuda.md.
LONE = (512, 4)
# For a row that is the only one.
SOLE = (64, 1)
# That one launch of tiles serves.
TILED_SLICES = 3


@triton.jit
def expand_kernel(
    y,
    residual,
    out,
    y_stride,
    residual_stride,
    out_stride,
    n,
    low_column,
    high_column,
    part,
    slices,
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
    HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EARLY: tl.constexpr,
):
    follow(EARLY)
    columns = low_column + tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < high_column
    start, live = tl.program_id(0), tl.load(seats)
    for unit in range(start, last_unit(start, live, LOOP), tl.num_programs(0)):
        member, low, left, high, weight, begin, end_more = read_unit(unit, members, first, place, rank, mix, more, ROWS)
        if unit < live:
            present = member >= 0
            rows = tl.where(present, member, 0).to(tl.int64)
            mask = present[:, None] & inside[None, :]
            acc = tl.load(y + rows[:, None] * y_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
            if HAS_RESIDUAL:
                where = residual + rows[:, None] * residual_stride + columns[None, :]
                acc += tl.load(where, mask=mask, other=0.0).to(tl.float32)
            hp = h + rows * h_stride + part
            acc = add_delta(acc, low, left, high, weight, hp, slices, b, n, columns, inside, ROWS, BLOCK_R)
            for extra in range(begin, end_more):
                low, left, high, weight = segment(extra, first, place, rank, mix, ROWS, ROWS)
                acc = add_delta(acc, low, left, high, weight, hp, slices, b, n, columns, inside, ROWS, BLOCK_R)
            tl.store(out + rows[:, None] * out_stride + columns[None, :], acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def lone_expand_kernel(
    y,
    residual,
    out,
    y_stride,
    residual_stride,
    out_stride,
    n,
    low_column,
    high_column,
    part,
    slices,
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
    SOLE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EARLY: tl.constexpr,
):
    columns = low_column + tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < high_column
    row, seat, low, left, high, weight, begin, end_more = lone_unit(
        tl.program_id(0), seats, members, first, place, rank, mix, more, ROWS, SOLE
    )
    if SOLE:
        br = some_of_b(0, low, high, b, n, columns, inside, BLOCK_R)
    follow(EARLY)
    acc = tl.load(y + row * y_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        acc += tl.load(residual + row * residual_stride + columns, mask=inside, other=0.0).to(tl.float32)
    hp = h + row * h_stride + part
    if SOLE:
        acc += lone_delta(br, low, left, high, weight, hp, slices, b, n, columns, inside, BLOCK_R)
    else:
        delta = streamed(low, left, high, hp, slices, b, n, columns, inside)
        acc += tl.where(weight != 0.0, weight * delta, 0.0)
    for extra in range(begin, end_more):
        low, left, high, weight = lone_segment(extra, seat, first, place, rank, mix, ROWS)
        br = some_of_b(0, low, high, b, n, columns, inside, BLOCK_R)
        acc += lone_delta(br, low, left, high, weight, hp, slices, b, n, columns, inside, BLOCK_R)
    tl.store(out + row * out_stride + columns, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def tiled_expand_kernel(
    y,
    residual,
    out,
    y_stride,
    residual_stride,
    out_stride,
    n,
    start1,
    start2,
    slices,
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
    ACROSS: tl.constexpr,
    MIXED: tl.constexpr,
    DEEP: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    if ACROSS:
        block, tile = tl.program_id(0), tl.program_id(1)
    else:
        tile, block = tl.program_id(0), tl.program_id(1)
    # Of at most three slices: no block of columns has part of two.
    blocks1 = tl.cdiv(start1, BLOCK)
    blocks2 = blocks1 + tl.cdiv(start2 - start1, BLOCK)
    part = tl.where(block < blocks1, 0, tl.where(block < blocks2, 1, 2))
    low_column = tl.where(part == 0, 0, tl.where(part == 1, start1, start2))
    high_column = tl.where(part == 0, start1, tl.where(part == 1, start2, n))
    block -= tl.where(part == 0, 0, tl.where(part == 1, blocks1, blocks2))
    columns = low_column + block * BLOCK + tl.arange(0, BLOCK)
    inside = columns < high_column
    unit, seat, member, weight = tile_rows(tile, members, mix, ROWS, BLOCK_M)
    present = member >= 0
    rows = tl.where(present, member, 0).to(tl.int64)
    mask = present[:, None] & inside[None, :]
    acc = tl.load(y + rows[:, None] * y_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        where = residual + rows[:, None] * residual_stride + columns[None, :]
        acc += tl.load(where, mask=mask, other=0.0).to(tl.float32)
    hp = h + rows * h_stride + part
    acc = add_tile(acc, unit, first, place, rank, weight, hp, slices, b, n, columns, inside, DEEP, BLOCK_R)
    if MIXED:
        for extra in range(tl.load(more + unit), tl.load(more + unit + 1)):
            weight = tl.load(mix + extra * ROWS + seat)
            acc = add_tile(acc, extra, first, place, rank, weight, hp, slices, b, n, columns, inside, DEEP, BLOCK_R)
    tl.store(out + rows[:, None] * out_stride + columns[None, :], acc.to(out.dtype.element_ty), mask=mask)


def _tiled(
    y: torch.Tensor,
    h: torch.Tensor,
    starts: tuple[int, ...],
    units: Units,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    tile: tiling.Tile,
) -> None:
    n = starts[-1]
    ends = (starts[1], starts[2] if len(starts) > 2 else n)
    most = tile.columns if y.dtype != torch.float32 else tiling.WIDE_COLUMNS
    widest = max(high - low for low, high in pairwise(starts))
    block, block_m = min(most, max(16, triton.next_power_of_2(widest))), min(tile.rows, units.rows)
    block_r = tiling.rank_block(units.largest)
    blocks = sum(triton.cdiv(high - low, block) for low, high in pairwise(starts))
    tiles = units.most * (units.rows // block_m)
    if not blocks:
        return
    tiled_expand_kernel[(blocks, tiles) if tile.across else (tiles, blocks)](
        y,
        y if residual is None else residual,
        out,
        y.stride(0),
        0 if residual is None else residual.stride(0),
        out.stride(0),
        n,
        *ends,
        len(starts) - 1,
        *pointers(h, units),
        ACROSS=tile.across,
        MIXED=units.mixed,
        DEEP=units.largest > block_r,
        HAS_RESIDUAL=residual is not None,
        ROWS=units.rows,
        BLOCK_M=block_m,
        BLOCK=block,
        BLOCK_R=block_r,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def expand(
    y: torch.Tensor,
    h: torch.Tensor,
    starts: tuple[int, ...],
    units: Units,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``y[:, :n]`` with residual and adapters added, ``[T, n]``; into ``out`` if given (y itself will do).

    ``h: [T, rank rows * slices]``, slices innermost; ``starts``: first column of each slice, and the end.
    """
    n, slices, tokens = starts[-1], len(starts) - 1, y.shape[0]
    if out is None:
        out = torch.empty((tokens, n), dtype=y.dtype, device=y.device)
    if not tokens:
        return out
    if units.largest and not units.batch_invariant and slices <= TILED_SLICES:
        _tiled(y, h, starts, units, residual, out, tiling.EXPAND)
        return out
    sole = tokens == 1 and not units.batch_invariant
    streamed = sole or units.streamed
    for i in range(slices):
        width = starts[i + 1] - starts[i]
        if not width:
            continue
        operands = (
            y,
            y if residual is None else residual,
            out,
            y.stride(0),
            0 if residual is None else residual.stride(0),
            out.stride(0),
            n,
            starts[i],
            starts[i + 1],
            i,
            slices,
            *pointers(h, units),
        )
        forms: dict[str, int | bool] = {
            "HAS_RESIDUAL": residual is not None,
            "ROWS": units.rows,
            "BLOCK_R": RANK_BLOCK,
            **early(streamed or lets_at_once(tokens)),
        }
        if streamed:
            most, warps = SOLE if sole else LONE
            block = min(most, max(16, triton.next_power_of_2(width)))
            lone_expand_kernel[(units.most, triton.cdiv(width, block))](
                *operands, SOLE=sole, BLOCK=block, num_warps=warps, **forms
            )
        else:
            block = min(BLOCK, max(16, triton.next_power_of_2(width)))
            blocks = triton.cdiv(width, block)
            lanes, loop = units.lanes(blocks)
            expand_kernel[(lanes, blocks)](*operands, LOOP=loop, BLOCK=block, num_warps=WARPS, **forms)
    return out
