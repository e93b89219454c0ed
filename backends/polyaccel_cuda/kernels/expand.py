"""``y + residual + adapters``: the expand of a row-parallel layer, of lm_head and of ``sgmv``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from polyaccel_cuda.kernels.delta import RANK_BLOCK, add_delta
from polyaccel_cuda.kernels.rows import TileAdapters, pointers


@triton.jit
def expand_kernel(
    y,
    residual,
    out,
    y_stride,
    residual_stride,
    out_stride,
    count,
    n,
    begin,
    end,
    part,
    slices,
    h,
    h_stride,
    b,
    starts,
    first,
    rank,
    mix,
    HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    tile = tl.program_id(0)
    rows = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = begin + tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < end
    mask = (rows < count)[:, None] & inside[None, :]
    acc = tl.load(y + rows[:, None] * y_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        where = residual + rows[:, None] * residual_stride + columns[None, :]
        acc += tl.load(where, mask=mask, other=0.0).to(tl.float32)
    h += rows * h_stride + part
    acc = add_delta(acc, h, slices, b, n, columns, inside, tile, starts, first, rank, mix, ROWS, BLOCK_R)
    tl.store(out + rows[:, None] * out_stride + columns[None, :], acc.to(out.dtype.element_ty), mask=mask)


def expand(
    y: torch.Tensor,
    h: torch.Tensor,
    starts: tuple[int, ...],
    adapters: TileAdapters,
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
    for i in range(slices):
        width = starts[i + 1] - starts[i]
        if not width:
            continue
        block = min(64, max(16, triton.next_power_of_2(width)))
        expand_kernel[(triton.cdiv(tokens, adapters.rows), triton.cdiv(width, block))](
            y,
            y if residual is None else residual,
            out,
            y.stride(0),
            0 if residual is None else residual.stride(0),
            out.stride(0),
            tokens,
            n,
            starts[i],
            starts[i + 1],
            i,
            slices,
            *pointers(h, adapters),
            HAS_RESIDUAL=residual is not None,
            ROWS=adapters.rows,
            BLOCK=block,
            BLOCK_R=RANK_BLOCK,
            num_warps=4,
        )
    return out
