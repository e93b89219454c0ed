"""Activation and expand of rows that are alone in their unit: B is streamed, rank row after rank row.

Tensor cores would be given a tile of which all rows but one are padding, and too few bytes would be on their way. As a
branch of the tiles' kernel this is slower than the tile: it would have the tile's registers, and so few programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from polyaccel_cuda.kernels.delta import add_delta, add_two_deltas, segment, silu
from polyaccel_cuda.kernels.rows import Units, pointers

SILU, EXPAND = (128, 1), (128, 1)
"""Columns and warps of a program. Measured, see docs/cuda.md."""


@triton.jit
def _lone(members, count, ROWS: tl.constexpr):
    """This program's unit, whether there is one, and its row, ``[1]``."""
    unit = tl.load(count + 1) + tl.program_id(0)
    known = unit < tl.load(count)
    unit = tl.where(known, unit, 0)
    return unit, known, tl.load(members + unit * ROWS + tl.arange(0, 1)).to(tl.int64)


@triton.jit
def lone_silu_and_mul_kernel(
    x,
    out,
    x_stride,
    n,
    h,
    h_stride,
    b,
    count,
    members,
    first,
    place,
    rank,
    mix,
    more,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    unit, known, row = _lone(members, count, ROWS)
    if known:
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = columns < n
        low, left, high, weight = segment(unit, first, place, rank, mix, ROWS, 1)
        begin, end = tl.load(more + unit), tl.load(more + unit + 1)
        where = x + row[:, None] * x_stride + columns[None, :]
        gate = tl.load(where, mask=inside[None, :], other=0.0).to(tl.float32)
        up = tl.load(where + n, mask=inside[None, :], other=0.0).to(tl.float32)
        h1, right, both = h + row * h_stride, n + columns, 2 * n
        h2 = h1 + 1
        gate, up = add_two_deltas(gate, up, low, left, high, weight, h1, h2, 2, b, both, columns, right, inside, 1, 1)
        for extra in range(begin, end):
            low, left, high, weight = segment(extra, first, place, rank, mix, ROWS, 1)
            gate, up = add_two_deltas(
                gate, up, low, left, high, weight, h1, h2, 2, b, both, columns, right, inside, 1, 1
            )
        y = silu(gate, out.dtype.element_ty) * up
        tl.store(out + row[:, None] * n + columns[None, :], y.to(out.dtype.element_ty), mask=inside[None, :])


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
    count,
    members,
    first,
    place,
    rank,
    mix,
    more,
    HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    unit, known, row = _lone(members, count, ROWS)
    if known:
        columns = low_column + tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = columns < high_column
        mask = inside[None, :]
        low, left, high, weight = segment(unit, first, place, rank, mix, ROWS, 1)
        begin, end = tl.load(more + unit), tl.load(more + unit + 1)
        acc = tl.load(y + row[:, None] * y_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            where = residual + row[:, None] * residual_stride + columns[None, :]
            acc += tl.load(where, mask=mask, other=0.0).to(tl.float32)
        hp = h + row * h_stride + part
        acc = add_delta(acc, low, left, high, weight, hp, slices, b, n, columns, inside, 1, 1)
        for extra in range(begin, end):
            low, left, high, weight = segment(extra, first, place, rank, mix, ROWS, 1)
            acc = add_delta(acc, low, left, high, weight, hp, slices, b, n, columns, inside, 1, 1)
        tl.store(out + row[:, None] * out_stride + columns[None, :], acc.to(out.dtype.element_ty), mask=mask)


def _block(most: int, width: int) -> int:
    return int(min(most, max(32, triton.next_power_of_2(width))))


def silu_and_mul(x: torch.Tensor, out: torch.Tensor, h: torch.Tensor, units: Units) -> None:
    """The rows of ``out: [T, n]`` that are alone in their unit; see :func:`activation.silu_and_mul`."""
    n, (most, warps) = out.shape[1], SILU
    block = _block(most, n)
    lone_silu_and_mul_kernel[(units.most, triton.cdiv(n, block))](
        x, out, x.stride(0), n, *pointers(h, units), ROWS=units.rows, BLOCK=block, num_warps=warps
    )


def expand(
    y: torch.Tensor,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    h: torch.Tensor,
    where: tuple[int, int, int, int, int],
    units: Units,
) -> None:
    """The rows that are alone in their unit, of one slice; ``where``: n, the slice's first column and end, its number
    and how many slices there are. See :func:`expand.expand`."""
    (_, low, high, _, _), (most, warps) = where, EXPAND
    block = _block(most, high - low)
    lone_expand_kernel[(units.most, triton.cdiv(high - low, block))](
        y,
        y if residual is None else residual,
        out,
        y.stride(0),
        0 if residual is None else residual.stride(0),
        out.stride(0),
        *where,
        *pointers(h, units),
        HAS_RESIDUAL=residual is not None,
        ROWS=units.rows,
        BLOCK=block,
        num_warps=warps,
    )
