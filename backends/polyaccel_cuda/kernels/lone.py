"""What adapters add to one row, streamed: parts of kernels in which each program serves a row, shared adapters or not.

The step's tables and the adapters' B were there before the step began. So these kernels read them before they wait for
their predecessor (:mod:`polyaccel_cuda.kernels.early`): what is left to wait for are the row and its rank rows.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def lone_unit(at, seats, members, first, place, rank, mix, more, ROWS: tl.constexpr, SOLE: tl.constexpr):
    """The ``at``-th row in order of the units; its seat in its unit, :func:`lone_segment`, and where the unit's other
    segments begin and end. See :class:`rows.Units`. ``SOLE``: the step has one row: nothing has to be read to know."""
    if SOLE:
        unit, seat, row = 0, 0, at.to(tl.int64) * 0
    else:
        place_of = tl.load(seats + 1 + at)
        unit, seat = place_of // ROWS, place_of % ROWS
        row = tl.load(members + place_of).to(tl.int64)
    low, left, high, weight = lone_segment(unit, seat, first, place, rank, mix, ROWS)
    return row, seat, low, left, high, weight, tl.load(more + unit), tl.load(more + unit + 1)


@triton.jit
def lone_segment(i, seat, first, place, rank, mix, ROWS: tl.constexpr):
    """Where segment i begins in B and in h, its rank, and the weight of the row in this seat."""
    low, left = tl.load(first + i).to(tl.int64), tl.load(place + i).to(tl.int64)
    return low, left, tl.load(rank + i), tl.load(mix + i * ROWS + seat)


@triton.jit
def some_of_b(r, low, high, b, n, columns, mask, BLOCK_R: tl.constexpr):
    """``[BLOCK_R, *columns]``: rank rows r and on of a slot whose first is ``low``, zero from its ``high``-th on."""
    ranks = r + tl.arange(0, BLOCK_R)
    if len(columns.shape) == 1:
        known = (ranks < high)[:, None] & mask[None, :]
        found = tl.load(b + (low + ranks)[:, None] * n + columns[None, :], mask=known, other=0.0)
    else:
        known = (ranks < high)[:, None, None] & mask[None, :, :]
        found = tl.load(b + (low + ranks)[:, None, None] * n + columns[None, :, :], mask=known, other=0.0)
    return found


@triton.jit
def _times_h(br, r, left, high, h, h_stride, BLOCK_R: tl.constexpr):
    ranks = r + tl.arange(0, BLOCK_R)
    hr = tl.load(h + (left + ranks) * h_stride, mask=ranks < high, other=0.0).to(tl.float32)
    if len(br.shape) == 2:
        product = hr[:, None] * br.to(tl.float32)
    else:
        product = hr[:, None, None] * br.to(tl.float32)
    return tl.sum(product, 0)


@triton.jit
def lone_delta(br, low, left, high, weight, h, h_stride, b, n, columns, mask, BLOCK_R: tl.constexpr):
    """``weight * h[left + r] * b[low + r, columns]``, summed over r in float32; zero, not even NaN, of weight 0.

    ``br``: :func:`some_of_b` from 0 on, read before. ``h``: the rank rows of one row and slice, ``h_stride`` apart.
    """
    delta = _times_h(br, 0, left, high, h, h_stride, BLOCK_R)
    for r in range(BLOCK_R, high, BLOCK_R):
        more = some_of_b(r, low, high, b, n, columns, mask, BLOCK_R)
        delta += _times_h(more, r, left, high, h, h_stride, BLOCK_R)
    return tl.where(weight != 0.0, weight * delta, 0.0)
