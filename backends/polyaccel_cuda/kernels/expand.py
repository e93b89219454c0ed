"""``y + residual + adapters``: the expand of a row-parallel layer, of lm_head and of ``sgmv``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from polyaccel_cuda.kernels.delta import RANK_BLOCK, add_delta, last_unit, read_unit, segment, served
from polyaccel_cuda.kernels.rows import SPLIT_EXPAND_ROWS, Units, pointers

BLOCK, WARPS = 64, 4
# For rows alone in their unit. Measured, see docs/cuda.md.
LONE = (128, 1)


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
    count,
    members,
    first,
    place,
    rank,
    mix,
    more,
    LOOP: tl.constexpr,
    SPLIT: tl.constexpr,
    ALONE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    columns = low_column + tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < high_column
    R: tl.constexpr = 1 if ALONE else ROWS
    start, live = served(count, SPLIT, ALONE)
    for unit in range(start, last_unit(start, live, LOOP), tl.num_programs(0)):
        member, low, left, high, weight, begin, end_more = read_unit(
            unit, members, first, place, rank, mix, more, ROWS, R
        )
        if unit < live:
            present = member >= 0
            rows = tl.where(present, member, 0).to(tl.int64)
            mask = present[:, None] & inside[None, :]
            acc = tl.load(y + rows[:, None] * y_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
            if HAS_RESIDUAL:
                where = residual + rows[:, None] * residual_stride + columns[None, :]
                acc += tl.load(where, mask=mask, other=0.0).to(tl.float32)
            hp = h + rows * h_stride + part
            acc = add_delta(acc, low, left, high, weight, hp, slices, b, n, columns, inside, R, BLOCK_R)
            for extra in range(begin, end_more):
                low, left, high, weight = segment(extra, first, place, rank, mix, ROWS, R)
                acc = add_delta(acc, low, left, high, weight, hp, slices, b, n, columns, inside, R, BLOCK_R)
            tl.store(out + rows[:, None] * out_stride + columns[None, :], acc.to(out.dtype.element_ty), mask=mask)


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
    split = units.split and units.most >= SPLIT_EXPAND_ROWS
    for i in range(slices):
        width = starts[i + 1] - starts[i]
        if not width:
            continue
        for alone in (False, True) if split else (False,):
            most, warps = LONE if alone else (BLOCK, WARPS)
            block = min(most, max(16, triton.next_power_of_2(width)))
            blocks = triton.cdiv(width, block)
            lanes, loop = (units.most, False) if alone else units.lanes(blocks)
            expand_kernel[(lanes, blocks)](
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
                HAS_RESIDUAL=residual is not None,
                LOOP=loop,
                SPLIT=split,
                ALONE=alone,
                ROWS=units.rows,
                BLOCK=block,
                BLOCK_R=RANK_BLOCK,
                num_warps=warps,
            )
    return out
