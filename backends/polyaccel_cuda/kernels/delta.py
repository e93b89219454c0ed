"""What adapters add to a unit of rows: the expand, as a part of other kernels; an exact exponential, and silu."""

from __future__ import annotations

import triton
import triton.language as tl

RANK_BLOCK = 32

AHEAD = tl.constexpr(16)
"""Rank rows of a row alone in its unit whose loads are under way together."""


# What a kernel reads of a unit does not depend on one another, and is read before anything of it is used: at decode a
# kernel takes as long as its longest chain of reads.


@triton.jit
def last_unit(start, live, LOOP: tl.constexpr):
    """Where a program's units end: after its first one, of the ``live`` there are, unless it takes several."""
    if LOOP:
        return live
    return start + 1


@triton.jit
def segment(i, first, place, rank, mix, ROWS: tl.constexpr, R: tl.constexpr):
    """Where segment i begins in B and in h, its rank, and the weight of its first R rows; see :class:`rows.Units`."""
    low, left = tl.load(first + i).to(tl.int64), tl.load(place + i).to(tl.int64)
    return low, left, tl.load(rank + i), tl.load(mix + i * ROWS + tl.arange(0, R))


@triton.jit
def read_unit(unit, members, first, place, rank, mix, more, ROWS: tl.constexpr):
    """A unit's rows, -1 beyond its own; its first :func:`segment`; where its other segments begin and end."""
    member = tl.load(members + unit * ROWS + tl.arange(0, ROWS))
    low, left, high, weight = segment(unit, first, place, rank, mix, ROWS, ROWS)
    return member, low, left, high, weight, tl.load(more + unit), tl.load(more + unit + 1)


@triton.jit
def read_lone(unit, members, mix, ROWS: tl.constexpr):
    """A unit's first row and its weight in the first segment, ``[1]`` each; and its second row, -1 if it is alone."""
    at = unit * ROWS + tl.arange(0, 1)
    return tl.load(members + at), tl.load(mix + at), tl.load(members + unit * ROWS + 1)


@triton.jit
def _only(pointers):
    """The scalar in a tensor of one pointer. A tensor of one element that is read in a loop goes through shared memory
    each time: the activation of 32 rows with adapters of their own took 59 us that way, and takes 24."""
    return tl.sum(pointers.to(tl.int64), 0).to(pointers.dtype)


@triton.jit
def streamed(low, left, high, h, h_stride, b, n, columns, inside):
    """``[columns]`` float32: the sum over r of one row, whose rank rows begin at ``h``."""
    delta = tl.zeros(columns.shape, tl.float32)
    for r in range(0, high, AHEAD):
        for j in tl.static_range(AHEAD):
            known = r + j < high
            br = tl.load(b + (low + r + j) * n + columns, mask=inside & known, other=0.0).to(tl.float32)
            delta += tl.load(h + (left + r + j) * h_stride, mask=known, other=0.0).to(tl.float32) * br
    return delta


@triton.jit
def two_streamed(low, left, high, h1, h2, h_stride, b, n, columns1, columns2, inside):
    """:func:`streamed` for two blocks of columns, whose reads are under way together."""
    delta1, delta2 = tl.zeros(columns1.shape, tl.float32), tl.zeros(columns2.shape, tl.float32)
    for r in range(0, high, AHEAD):
        for j in tl.static_range(AHEAD):
            known = r + j < high
            rows, mask, index = b + (low + r + j) * n, inside & known, (left + r + j) * h_stride
            b1 = tl.load(rows + columns1, mask=mask, other=0.0).to(tl.float32)
            b2 = tl.load(rows + columns2, mask=mask, other=0.0).to(tl.float32)
            delta1 += tl.load(h1 + index, mask=known, other=0.0).to(tl.float32) * b1
            delta2 += tl.load(h2 + index, mask=known, other=0.0).to(tl.float32) * b2
    return delta1, delta2


@triton.jit
def add_delta(acc, low, left, high, weight, h, h_stride, b, n, columns, inside, R: tl.constexpr, BLOCK_R: tl.constexpr):
    """``acc + weight * h[:, left + r] * b[low + r, columns]``, summed over r.

    ``acc: [R, columns]`` float32. ``h: [R]`` pointers to the rank rows of one slice, ``h_stride`` elements apart.
    ``b: [rank rows, n]`` dense. Rows of weight 0 get nothing, not even a NaN. For one row tensor cores would have to be
    given sixteen: it takes one rank row after the other.
    """
    own = weight != 0.0
    delta = tl.zeros_like(acc)
    if R == 1:
        delta += streamed(low, left, high, _only(h), h_stride, b, n, columns, inside)[None, :]
    else:
        for r in range(0, high, BLOCK_R):
            ranks = r + tl.arange(0, BLOCK_R)
            known = ranks < high
            where = b + (low + ranks)[:, None] * n + columns[None, :]
            br = tl.load(where, mask=known[:, None] & inside[None, :], other=0.0)
            hr = tl.load(h[:, None] + (left + ranks)[None, :] * h_stride, mask=own[:, None] & known[None, :], other=0.0)
            delta = tl.dot(hr, br, delta, input_precision="ieee")
    return acc + tl.where(own[:, None], weight[:, None] * delta, 0.0)


@triton.jit
def add_two_deltas(
    acc1,
    acc2,
    low,
    left,
    high,
    weight,
    h1,
    h2,
    h_stride,
    b,
    n,
    columns1,
    columns2,
    inside,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """:func:`add_delta` for two blocks of columns, all of which is read before any is multiplied."""
    own = weight != 0.0
    delta1, delta2 = tl.zeros_like(acc1), tl.zeros_like(acc2)
    if R == 1:
        only1, only2 = _only(h1), _only(h2)
        lone1, lone2 = two_streamed(low, left, high, only1, only2, h_stride, b, n, columns1, columns2, inside)
        delta1 += lone1[None, :]
        delta2 += lone2[None, :]
    else:
        for r in range(0, high, BLOCK_R):
            ranks = r + tl.arange(0, BLOCK_R)
            known = ranks < high
            rows, mask = b + (low + ranks)[:, None] * n, known[:, None] & inside[None, :]
            b1 = tl.load(rows + columns1[None, :], mask=mask, other=0.0)
            b2 = tl.load(rows + columns2[None, :], mask=mask, other=0.0)
            index, mask = (left + ranks)[None, :] * h_stride, own[:, None] & known[None, :]
            hr1 = tl.load(h1[:, None] + index, mask=mask, other=0.0)
            hr2 = tl.load(h2[:, None] + index, mask=mask, other=0.0)
            delta1 = tl.dot(hr1, b1, delta1, input_precision="ieee")
            delta2 = tl.dot(hr2, b2, delta2, input_precision="ieee")
    acc1 += tl.where(own[:, None], weight[:, None] * delta1, 0.0)
    acc2 += tl.where(own[:, None], weight[:, None] * delta2, 0.0)
    return acc1, acc2


@triton.jit
def tile_rows(tile, members, mix, ROWS: tl.constexpr, M: tl.constexpr):
    """A prefill's tile: its unit, its seats in that, their rows (-1 beyond the unit's own), and their weights in the
    unit's first segment."""
    unit = tile // (ROWS // M)
    seat = tile % (ROWS // M) * M + tl.arange(0, M)
    return unit, seat, tl.load(members + unit * ROWS + seat), tl.load(mix + unit * ROWS + seat)


@triton.jit
def add_tile(
    acc, i, first, place, rank, weight, h, h_stride, b, n, columns, inside, DEEP: tl.constexpr, BLOCK_R: tl.constexpr
):
    """:func:`add_delta` of segment i; unless DEEP, no rank is above BLOCK_R."""
    low, left, high = tl.load(first + i).to(tl.int64), tl.load(place + i).to(tl.int64), tl.load(rank + i)
    own = weight != 0.0
    delta = tl.zeros_like(acc)
    if DEEP:
        for r in range(0, high, BLOCK_R):
            delta = _tile_product(delta, r, low, left, high, own, h, h_stride, b, n, columns, inside, BLOCK_R)
    else:
        delta = _tile_product(delta, 0, low, left, high, own, h, h_stride, b, n, columns, inside, BLOCK_R)
    return acc + tl.where(own[:, None], weight[:, None] * delta, 0.0)


@triton.jit
def _tile_product(delta, r, low, left, high, own, h, h_stride, b, n, columns, inside, BLOCK_R: tl.constexpr):
    ranks = r + tl.arange(0, BLOCK_R)
    known = ranks < high
    where = b + (low + ranks)[:, None] * n + columns[None, :]
    br = tl.load(where, mask=known[:, None] & inside[None, :], other=0.0)
    hr = tl.load(h[:, None] + (left + ranks)[None, :] * h_stride, mask=own[:, None] & known[None, :], other=0.0)
    return tl.dot(hr, br, delta, input_precision="ieee")


@triton.jit
def add_two_tiles(
    acc1,
    acc2,
    i,
    first,
    place,
    rank,
    weight,
    h,
    b,
    n,
    columns1,
    columns2,
    inside,
    WOVEN: tl.constexpr,
    DEEP: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """:func:`add_tile` for both slices of a layer that has two, whose rank rows take turns from ``h: [M]`` on."""
    low, left, high = tl.load(first + i).to(tl.int64), tl.load(place + i).to(tl.int64), tl.load(rank + i)
    own = weight != 0.0
    delta1, delta2 = tl.zeros_like(acc1), tl.zeros_like(acc2)
    if DEEP:
        for r in range(0, high, BLOCK_R):
            delta1, delta2 = _two_tile_products(
                delta1, delta2, r, low, left, high, own, h, b, n, columns1, columns2, inside, WOVEN, BLOCK_R
            )
    else:
        delta1, delta2 = _two_tile_products(
            delta1, delta2, 0, low, left, high, own, h, b, n, columns1, columns2, inside, WOVEN, BLOCK_R
        )
    acc1 += tl.where(own[:, None], weight[:, None] * delta1, 0.0)
    acc2 += tl.where(own[:, None], weight[:, None] * delta2, 0.0)
    return acc1, acc2


@triton.jit
def _two_tile_products(
    delta1,
    delta2,
    r,
    low,
    left,
    high,
    own,
    h,
    b,
    n,
    columns1,
    columns2,
    inside,
    WOVEN: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    if WOVEN:
        # Both slices' rank rows as one operand; the other slice's meet zeros.
        pair = tl.arange(0, 2 * BLOCK_R)
        ranks = r + pair // 2
        known = ranks < high
        rows = b + (low + ranks)[:, None] * n
        even, odd = known & (pair % 2 == 0), known & (pair % 2 == 1)
        b1 = tl.load(rows + columns1[None, :], mask=even[:, None] & inside[None, :], other=0.0)
        b2 = tl.load(rows + columns2[None, :], mask=odd[:, None] & inside[None, :], other=0.0)
        both = tl.load(h[:, None] + (2 * (left + r) + pair)[None, :], mask=own[:, None] & known[None, :], other=0.0)
        delta1 = tl.dot(both, b1, delta1, input_precision="ieee")
        delta2 = tl.dot(both, b2, delta2, input_precision="ieee")
    else:
        delta1 = _tile_product(delta1, r, low, left, high, own, h, 2, b, n, columns1, inside, BLOCK_R)
        delta2 = _tile_product(delta2, r, low, left, high, own, h + 1, 2, b, n, columns2, inside, BLOCK_R)
    return delta1, delta2


@triton.jit
def exp(x):
    """Within 2 units in the last place where the result is normal; the hardware's own loses one for each bit of x."""
    bounded = tl.minimum(tl.maximum(x, -105.0), 90.0)
    n = tl.floor(bounded * 1.4426950408889634 + 0.5)
    # Two parts of ln 2; the first has so few bits that its product with n is exact.
    r = (bounded - n * 0.693359375) + n * 2.12194440e-4
    half = tl.floor(n * 0.5)
    return tl.where(x != x, x, tl.exp(r) * tl.exp2(half) * tl.exp2(n - half))


@triton.jit
def silu(x, kind: tl.constexpr):
    """In float32; of 16 bits the hardware's exponential is far more than right: a result may be rounded to them."""
    if kind == tl.float32:
        return x / (1.0 + exp(-x))
    return x / (1.0 + tl.exp(-x))
