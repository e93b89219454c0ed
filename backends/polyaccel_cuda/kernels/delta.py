"""What adapters add to a tile of rows and columns: the expand, as a part of other kernels; and an exact exponential."""

from __future__ import annotations

import triton
import triton.language as tl

RANK_BLOCK = 32


@triton.jit
def add_delta(
    acc,
    h,
    h_stride,
    b,
    n,
    columns,
    inside,
    tile,
    starts,
    first,
    rank,
    mix,
    ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """``acc + sum_i mix_i * h[:, first_i + r] * b[first_i + r, columns]`` over the segments i of a tile of rows.

    ``acc: [ROWS, columns]`` float32. ``h: [ROWS]`` pointers to the rank rows of one slice, ``h_stride`` elements apart.
    ``b: [rank rows, n]`` dense. ``starts: [tiles + 1]``, ``first, rank: [segments]``, ``mix: [segments, ROWS]``, 0 for
    rows that are not of the segment: they get nothing, not even a NaN.
    """
    begin = tl.load(starts + tile)
    end = tl.load(starts + tile + 1)
    for i in range(begin, end):
        low = tl.load(first + i)
        high = tl.load(rank + i)
        weight = tl.load(mix + i * ROWS + tl.arange(0, ROWS))
        own = weight != 0.0
        part = tl.zeros_like(acc)
        for r in range(0, high, BLOCK_R):
            ranks = r + tl.arange(0, BLOCK_R)
            known = ranks < high
            index = (low + ranks).to(tl.int64)
            hr = tl.load(h[:, None] + index[None, :] * h_stride, mask=own[:, None] & known[None, :], other=0.0)
            where = b + index[:, None] * n + columns[None, :]
            br = tl.load(where, mask=known[:, None] & inside[None, :], other=0.0)
            part = tl.dot(hr, br, part, input_precision="ieee")
        acc += tl.where(own[:, None], weight[:, None] * part, 0.0)
    return acc


@triton.jit
def exp(x):
    """Within 2 units in the last place where the result is normal; the hardware's own loses one for each bit of x."""
    bounded = tl.minimum(tl.maximum(x, -105.0), 90.0)
    n = tl.floor(bounded * 1.4426950408889634 + 0.5)
    # Two parts of ln 2; the first has so few bits that its product with n is exact.
    r = (bounded - n * 0.693359375) + n * 2.12194440e-4
    half = tl.floor(n * 0.5)
    return tl.where(x != x, x, tl.exp(r) * tl.exp2(half) * tl.exp2(n - half))
