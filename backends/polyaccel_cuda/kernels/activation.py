"""silu_and_mul of both halves of a row, with adapters added first where there are any; gelu."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from polyaccel_cuda.kernels import tiling
from polyaccel_cuda.kernels.delta import (
    RANK_BLOCK,
    add_two_deltas,
    add_two_tiles,
    exp,
    last_unit,
    read_unit,
    segment,
    silu,
    tile_rows,
    two_streamed,
)
from polyaccel_cuda.kernels.early import early, follow, lets_at_once
from polyaccel_cuda.kernels.lone import lone_delta, lone_segment, lone_unit, some_of_b
from polyaccel_cuda.kernels.rows import Units, pointers

BLOCK, WARPS = 128, 4
# Where each row has programs of its own. Measured, see docs/cuda.md.
LONE = (64, 1)
# For a row that is the only one.
SOLE = (128, 1)


@triton.jit
def silu_and_mul_kernel(x, out, x_stride, n, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    follow(EARLY)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < n
    x += row * x_stride
    gate = tl.load(x + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + n + columns, mask=inside, other=0.0).to(tl.float32)
    y = silu(gate, out.dtype.element_ty) * up
    tl.store(out + row * n + columns, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def adapted_silu_and_mul_kernel(
    x,
    out,
    x_stride,
    n,
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
    EARLY: tl.constexpr,
):
    follow(EARLY)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < n
    start, live = tl.program_id(0), tl.load(seats)
    for unit in range(start, last_unit(start, live, LOOP), tl.num_programs(0)):
        member, low, left, high, weight, begin, end_more = read_unit(unit, members, first, place, rank, mix, more, ROWS)
        if unit < live:
            present = member >= 0
            rows = tl.where(present, member, 0).to(tl.int64)
            mask = present[:, None] & inside[None, :]
            where = x + rows[:, None] * x_stride + columns[None, :]
            gate = tl.load(where, mask=mask, other=0.0).to(tl.float32)
            up = tl.load(where + n, mask=mask, other=0.0).to(tl.float32)
            h1, right, both = h + rows * h_stride, n + columns, 2 * n
            h2 = h1 + 1
            gate, up = add_two_deltas(
                gate, up, low, left, high, weight, h1, h2, 2, b, both, columns, right, inside, ROWS, BLOCK_R
            )
            for extra in range(begin, end_more):
                low, left, high, weight = segment(extra, first, place, rank, mix, ROWS, ROWS)
                gate, up = add_two_deltas(
                    gate, up, low, left, high, weight, h1, h2, 2, b, both, columns, right, inside, ROWS, BLOCK_R
                )
            y = silu(gate, out.dtype.element_ty) * up
            tl.store(out + rows[:, None] * n + columns[None, :], y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def lone_silu_and_mul_kernel(
    x,
    out,
    x_stride,
    n,
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
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EARLY: tl.constexpr,
):
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < n
    right, both = n + columns, 2 * n
    row, seat, low, left, high, weight, begin, end_more = lone_unit(
        tl.program_id(1), seats, members, first, place, rank, mix, more, ROWS, SOLE
    )
    if SOLE:
        b1 = some_of_b(0, low, high, b, both, columns, inside, BLOCK_R)
        b2 = some_of_b(0, low, high, b, both, right, inside, BLOCK_R)
    follow(EARLY)
    gate = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * x_stride + right, mask=inside, other=0.0).to(tl.float32)
    hp = h + row * h_stride
    if SOLE:
        gate += lone_delta(b1, low, left, high, weight, hp, 2, b, both, columns, inside, BLOCK_R)
        up += lone_delta(b2, low, left, high, weight, hp + 1, 2, b, both, right, inside, BLOCK_R)
    else:
        delta1, delta2 = two_streamed(low, left, high, hp, hp + 1, 2, b, both, columns, right, inside)
        gate += tl.where(weight != 0.0, weight * delta1, 0.0)
        up += tl.where(weight != 0.0, weight * delta2, 0.0)
    for extra in range(begin, end_more):
        low, left, high, weight = lone_segment(extra, seat, first, place, rank, mix, ROWS)
        b1 = some_of_b(0, low, high, b, both, columns, inside, BLOCK_R)
        b2 = some_of_b(0, low, high, b, both, right, inside, BLOCK_R)
        gate += lone_delta(b1, low, left, high, weight, hp, 2, b, both, columns, inside, BLOCK_R)
        up += lone_delta(b2, low, left, high, weight, hp + 1, 2, b, both, right, inside, BLOCK_R)
    y = silu(gate, out.dtype.element_ty) * up
    tl.store(out + row * n + columns, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def tiled_silu_and_mul_kernel(
    x,
    out,
    x_stride,
    n,
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
    WOVEN: tl.constexpr,
    MIXED: tl.constexpr,
    DEEP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    if ACROSS:
        block, tile = tl.program_id(0), tl.program_id(1)
    else:
        tile, block = tl.program_id(0), tl.program_id(1)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    inside = columns < n
    unit, seat, member, weight = tile_rows(tile, members, mix, ROWS, BLOCK_M)
    present = member >= 0
    rows = tl.where(present, member, 0).to(tl.int64)
    mask = present[:, None] & inside[None, :]
    where = x + rows[:, None] * x_stride + columns[None, :]
    gate = tl.load(where, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(where + n, mask=mask, other=0.0).to(tl.float32)
    hp, both, right = h + rows * h_stride, 2 * n, n + columns
    gate, up = add_two_tiles(
        gate, up, unit, first, place, rank, weight, hp, b, both, columns, right, inside, WOVEN, DEEP, BLOCK_R
    )
    if MIXED:
        for extra in range(tl.load(more + unit), tl.load(more + unit + 1)):
            weight = tl.load(mix + extra * ROWS + seat)
            gate, up = add_two_tiles(
                gate, up, extra, first, place, rank, weight, hp, b, both, columns, right, inside, WOVEN, DEEP, BLOCK_R
            )
    y = silu(gate, out.dtype.element_ty) * up
    tl.store(out + rows[:, None] * n + columns[None, :], y.to(out.dtype.element_ty), mask=mask)


def _tiled(x: torch.Tensor, out: torch.Tensor, n: int, h: torch.Tensor, units: Units, tile: tiling.Tile) -> None:
    most = tile.columns if x.dtype != torch.float32 else tiling.WIDE_COLUMNS
    block, block_m = min(most, max(16, triton.next_power_of_2(n))), min(tile.rows, units.rows)
    block_r = tiling.rank_block(units.largest)
    blocks, tiles = triton.cdiv(n, block), units.most * (units.rows // block_m)
    tiled_silu_and_mul_kernel[(blocks, tiles) if tile.across else (tiles, blocks)](
        x,
        out,
        x.stride(0),
        n,
        *pointers(h, units),
        ACROSS=tile.across,
        WOVEN=tile.woven,
        MIXED=units.mixed,
        DEEP=units.largest > block_r,
        ROWS=units.rows,
        BLOCK_M=block_m,
        BLOCK=block,
        BLOCK_R=block_r,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def silu_and_mul(x: torch.Tensor, n: int, h: torch.Tensor | None = None, units: Units | None = None) -> torch.Tensor:
    """``[T, n]`` from ``x: [T, at least 2 n]``; ``h: [T, rank rows * 2]``, slices innermost."""
    tokens = x.shape[0]
    out = torch.empty((tokens, n), dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    if h is None or units is None:
        block = min(1024, max(128, triton.next_power_of_2(n)))
        silu_and_mul_kernel[(tokens, triton.cdiv(n, block))](
            x, out, x.stride(0), n, BLOCK=block, num_warps=4, **early(lets_at_once(tokens))
        )
        return out
    if units.largest:
        _tiled(x, out, n, h, units, tiling.ACTIVATION)
        return out
    sole = tokens == 1
    streamed = sole or units.streamed
    operands = (x, out, x.stride(0), n, *pointers(h, units))
    forms: dict[str, int | bool] = {
        "ROWS": units.rows,
        "BLOCK_R": RANK_BLOCK,
        **early(streamed or lets_at_once(tokens)),
    }
    if streamed:
        most, warps = SOLE if sole else LONE
        block = min(most, max(16, triton.next_power_of_2(n)))
        # A row's programs one after the other: they read the same rows of B.
        lone_silu_and_mul_kernel[(triton.cdiv(n, block), units.most)](
            *operands, SOLE=sole, BLOCK=block, num_warps=warps, **forms
        )
    else:
        block = min(BLOCK, max(16, triton.next_power_of_2(n)))
        blocks = triton.cdiv(n, block)
        lanes, loop = units.lanes(blocks)
        adapted_silu_and_mul_kernel[(lanes, blocks)](*operands, LOOP=loop, BLOCK=block, num_warps=WARPS, **forms)
    return out


@triton.jit
def gelu_kernel(x, out, total, TANH: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < total
    wide = tl.load(x + index, mask=inside, other=0.0).to(tl.float32)
    if TANH:
        inner = 0.7978845608028654 * (wide + 0.044715 * wide * wide * wide)
        # 1 + tanh(z) = 2 / (1 + exp(-2 z)), without cancellation for negative z.
        y = wide / (1.0 + exp(-2.0 * inner))
    else:
        y = 0.5 * wide * (1.0 + tl.erf(wide * 0.7071067811865476))
    tl.store(out + index, y.to(out.dtype.element_ty), mask=inside)


def gelu(x: torch.Tensor, approximate: str) -> torch.Tensor:
    """Of a dense x; a new tensor."""
    out = torch.empty_like(x)
    if out.numel():
        gelu_kernel[(triton.cdiv(x.numel(), 1024),)](x, out, x.numel(), TANH=approximate == "tanh", BLOCK=1024)
    return out
