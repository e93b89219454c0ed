"""From the rows of a qkv product to queries and the cache: adapters, per-head norm, rotation and the KV write."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from polyaccel.backend import RopeTable
from polyaccel_cuda.kernels.delta import (
    RANK_BLOCK,
    add_delta,
    add_two_deltas,
    last_unit,
    read_lone,
    read_unit,
    segment,
)
from polyaccel_cuda.kernels.early import early, follow, lets_at_once
from polyaccel_cuda.kernels.lone import lone_delta, lone_segment, lone_unit, some_of_b
from polyaccel_cuda.kernels.rows import Pointers, Units, pointers

WARPS = 4
# Where each row has programs of its own, and for a row that is the only one.
LONE_WARPS = 1


@triton.jit
def _turn_and_store(
    x1,
    x2,
    x3,
    c,
    s,
    rows,
    present,
    slot,
    one,
    two,
    rest,
    turned,
    over,
    head,
    is_q,
    is_v,
    q_out,
    keys,
    values,
    q_norm,
    k_norm,
    q_heads,
    kv_heads,
    head_dim,
    block_size,
    eps,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
    HAS_REST: tl.constexpr,
):
    """A head's halves and its rest, ``[rows, columns]`` float32 each: norm, rotation, and where they belong."""
    kind = q_out.dtype.element_ty
    square = tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)
    if HAS_REST:
        square += tl.sum(x3 * x3, 1)
    scale = (1.0 / tl.sqrt_rn(square / head_dim + eps))[:, None]
    if Q_NORM:
        if is_q:
            x1 *= scale * tl.load(q_norm + one, mask=turned, other=0.0).to(tl.float32)[None, :]
            x2 *= scale * tl.load(q_norm + two, mask=turned, other=0.0).to(tl.float32)[None, :]
            if HAS_REST:
                x3 *= scale * tl.load(q_norm + rest, mask=over, other=0.0).to(tl.float32)[None, :]
    if K_NORM:
        if (head >= q_heads) & (head < q_heads + kv_heads):
            x1 *= scale * tl.load(k_norm + one, mask=turned, other=0.0).to(tl.float32)[None, :]
            x2 *= scale * tl.load(k_norm + two, mask=turned, other=0.0).to(tl.float32)[None, :]
            if HAS_REST:
                x3 *= scale * tl.load(k_norm + rest, mask=over, other=0.0).to(tl.float32)[None, :]
    o1 = tl.where(is_v, x1, x1 * c - x2 * s)
    o2 = tl.where(is_v, x2, x2 * c + x1 * s)
    if is_q:
        out = q_out + (rows * q_heads + head) * head_dim
        kept = present
    else:
        kept = slot >= 0
        kv_head = tl.where(is_v, head - q_heads - kv_heads, head - q_heads)
        offset = ((slot // block_size * kv_heads + kv_head) * block_size + slot % block_size) * head_dim
        offset = tl.where(kept, offset, 0)
        if is_v:
            out = values + offset
        else:
            out = keys + offset
    mask = kept[:, None] & turned[None, :]
    tl.store(out[:, None] + one[None, :], o1.to(kind), mask=mask)
    tl.store(out[:, None] + two[None, :], o2.to(kind), mask=mask)
    if HAS_REST:
        tl.store(out[:, None] + rest[None, :], x3.to(kind), mask=kept[:, None] & over[None, :])


@triton.jit
def _rope_rows(
    y,
    q_out,
    keys,
    values,
    kv_slots,
    positions,
    cos,
    sin,
    q_norm,
    k_norm,
    y_stride,
    n,
    q_heads,
    kv_heads,
    head_dim,
    half,
    block_size,
    eps,
    h,
    h_stride,
    b,
    unit,
    member,
    low,
    left,
    high,
    weight,
    begin,
    end_more,
    first,
    place,
    rank,
    mix,
    head,
    ADAPTED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
    HAS_REST: tl.constexpr,
    ROWS: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    is_q = head < q_heads
    is_v = head >= q_heads + kv_heads
    i = tl.arange(0, BLOCK)
    turned = i < half
    if INTERLEAVED:
        one, two = 2 * i, 2 * i + 1
    else:
        one, two = i, i + half
    base = head * head_dim
    rest = 2 * half + tl.arange(0, BLOCK_REST)
    over = rest < head_dim
    present = member >= 0
    rows = tl.where(present, member, 0).to(tl.int64)
    position = tl.load(positions + rows, mask=present, other=0)
    slot = tl.load(kv_slots + rows, mask=present, other=-1)
    here = y + rows[:, None] * y_stride + base
    mask = present[:, None] & turned[None, :]
    x1 = tl.load(here + one[None, :], mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(here + two[None, :], mask=mask, other=0.0).to(tl.float32)
    c = tl.load(cos + position[:, None] * half + i[None, :], mask=mask, other=1.0)
    s = tl.load(sin + position[:, None] * half + i[None, :], mask=mask, other=0.0)
    if ADAPTED:
        hp = h + rows * h_stride + tl.where(is_q, 0, tl.where(is_v, 2, 1))
        x1, x2 = add_two_deltas(
            x1, x2, low, left, high, weight, hp, hp, 3, b, n, base + one, base + two, turned, R, BLOCK_R
        )
        for extra in range(begin, end_more):
            low, left, high, weight = segment(extra, first, place, rank, mix, ROWS, R)
            x1, x2 = add_two_deltas(
                x1, x2, low, left, high, weight, hp, hp, 3, b, n, base + one, base + two, turned, R, BLOCK_R
            )
    mask_rest = present[:, None] & over[None, :]
    x3 = x1
    if HAS_REST:
        x3 = tl.load(here + rest[None, :], mask=mask_rest, other=0.0).to(tl.float32)
        if ADAPTED:
            low, left, high, weight = segment(unit, first, place, rank, mix, ROWS, R)
            x3 = add_delta(x3, low, left, high, weight, hp, 3, b, n, base + rest, over, R, BLOCK_R)
            for extra in range(begin, end_more):
                low, left, high, weight = segment(extra, first, place, rank, mix, ROWS, R)
                x3 = add_delta(x3, low, left, high, weight, hp, 3, b, n, base + rest, over, R, BLOCK_R)
    _turn_and_store(
        x1, x2, x3, c, s, rows, present, slot, one, two, rest, turned, over, head, is_q, is_v,
        q_out, keys, values, q_norm, k_norm, q_heads, kv_heads, head_dim, block_size, eps, Q_NORM, K_NORM, HAS_REST,
    )  # fmt: skip


@triton.jit
def rope_cache_kernel(
    y,
    q_out,
    keys,
    values,
    kv_slots,
    positions,
    cos,
    sin,
    q_norm,
    k_norm,
    y_stride,
    n,
    q_heads,
    kv_heads,
    head_dim,
    half,
    block_size,
    eps,
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
    ADAPTED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
    HAS_REST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EARLY: tl.constexpr,
):
    follow(EARLY)
    head = tl.program_id(1)
    if ADAPTED:
        live = tl.load(seats)
        for unit in range(tl.program_id(0), last_unit(tl.program_id(0), live, LOOP), tl.num_programs(0)):
            lead, alone, second = read_lone(unit, members, mix, ROWS)
            member, low, left, high, weight, begin, end_more = read_unit(
                unit, members, first, place, rank, mix, more, ROWS
            )
            if unit < live:
                if second < 0:
                    _rope_rows(
                        y, q_out, keys, values, kv_slots, positions, cos, sin, q_norm, k_norm, y_stride, n,
                        q_heads, kv_heads, head_dim, half, block_size, eps, h, h_stride, b, unit,
                        lead, low, left, high, alone, begin, end_more, first, place, rank, mix, head,
                        ADAPTED, INTERLEAVED, Q_NORM, K_NORM, HAS_REST, ROWS, 1, BLOCK, BLOCK_REST, BLOCK_R,
                    )  # fmt: skip
                else:
                    _rope_rows(
                        y, q_out, keys, values, kv_slots, positions, cos, sin, q_norm, k_norm, y_stride, n,
                        q_heads, kv_heads, head_dim, half, block_size, eps, h, h_stride, b, unit,
                        member, low, left, high, weight, begin, end_more, first, place, rank, mix, head,
                        ADAPTED, INTERLEAVED, Q_NORM, K_NORM, HAS_REST, ROWS, ROWS, BLOCK, BLOCK_REST, BLOCK_R,
                    )  # fmt: skip
    else:
        unit = tl.program_id(0)
        member = unit + tl.arange(0, 1)
        _rope_rows(
            y, q_out, keys, values, kv_slots, positions, cos, sin, q_norm, k_norm, y_stride, n, q_heads, kv_heads,
            head_dim, half, block_size, eps, h, h_stride, b, unit, member, 0, 0, 0, 0.0, 0, 0,
            first, place, rank, mix, head, ADAPTED, INTERLEAVED, Q_NORM, K_NORM, HAS_REST, ROWS, 1,
            BLOCK, BLOCK_REST, BLOCK_R,
        )  # fmt: skip


@triton.jit
def lone_rope_cache_kernel(
    y,
    q_out,
    keys,
    values,
    kv_slots,
    positions,
    cos,
    sin,
    q_norm,
    k_norm,
    y_stride,
    n,
    q_heads,
    kv_heads,
    head_dim,
    half,
    block_size,
    eps,
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
    INTERLEAVED: tl.constexpr,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
    HAS_REST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EARLY: tl.constexpr,
):
    head = tl.program_id(1)
    is_q = head < q_heads
    is_v = head >= q_heads + kv_heads
    base = head * head_dim
    i = tl.arange(0, BLOCK)
    turned = i < half
    both = tl.arange(0, 2)
    # Both halves of a head's pairs, read together.
    if INTERLEAVED:
        one, two, columns = 2 * i, 2 * i + 1, 2 * i[:, None] + both[None, :]
    else:
        one, two, columns = i, i + half, i[:, None] + half * both[None, :]
    pairs = turned[:, None] & (both >= 0)[None, :]
    rest = 2 * half + tl.arange(0, BLOCK_REST)
    over = rest < head_dim
    row, seat, low, left, high, weight, begin, end_more = lone_unit(
        tl.program_id(0), seats, members, first, place, rank, mix, more, ROWS, SOLE
    )
    br = some_of_b(0, low, high, b, n, base + columns, pairs, BLOCK_R)
    if HAS_REST:
        b3 = some_of_b(0, low, high, b, n, base + rest, over, BLOCK_R)
    position = tl.load(positions + row)
    rows = row + tl.zeros([1], tl.int64)
    slot = tl.load(kv_slots + rows)
    c = tl.load(cos + position * half + i, mask=turned, other=1.0)[None, :]
    s = tl.load(sin + position * half + i, mask=turned, other=0.0)[None, :]
    follow(EARLY)
    here = y + row * y_stride + base
    x1 = tl.load(here + one, mask=turned, other=0.0).to(tl.float32)
    x2 = tl.load(here + two, mask=turned, other=0.0).to(tl.float32)
    hp = h + row * h_stride + tl.where(is_q, 0, tl.where(is_v, 2, 1))
    delta = lone_delta(br, low, left, high, weight, hp, 3, b, n, base + columns, pairs, BLOCK_R)
    x3 = x1
    if HAS_REST:
        x3 = tl.load(here + rest, mask=over, other=0.0).to(tl.float32)
        x3 += lone_delta(b3, low, left, high, weight, hp, 3, b, n, base + rest, over, BLOCK_R)
    for extra in range(begin, end_more):
        low, left, high, weight = lone_segment(extra, seat, first, place, rank, mix, ROWS)
        br = some_of_b(0, low, high, b, n, base + columns, pairs, BLOCK_R)
        delta += lone_delta(br, low, left, high, weight, hp, 3, b, n, base + columns, pairs, BLOCK_R)
        if HAS_REST:
            b3 = some_of_b(0, low, high, b, n, base + rest, over, BLOCK_R)
            x3 += lone_delta(b3, low, left, high, weight, hp, 3, b, n, base + rest, over, BLOCK_R)
    delta1, delta2 = tl.split(delta)
    _turn_and_store(
        (x1 + delta1)[None, :], (x2 + delta2)[None, :], x3[None, :], c, s, rows, rows >= 0, slot,
        one, two, rest, turned, over, head, is_q, is_v, q_out, keys, values, q_norm, k_norm,
        q_heads, kv_heads, head_dim, block_size, eps, Q_NORM, K_NORM, HAS_REST,
    )  # fmt: skip


def rope_cache(
    y: torch.Tensor,
    heads: tuple[int, int, int],
    rope: RopeTable,
    norms: tuple[torch.Tensor | None, torch.Tensor | None, float],
    cache: tuple[torch.Tensor, torch.Tensor],
    kv_slots: torch.Tensor,
    positions: torch.Tensor,
    h: torch.Tensor | None = None,
    units: Units | None = None,
) -> torch.Tensor:
    """Queries ``[T, q_heads, head_dim]`` from ``y: [T, at least n]``; keys and values go to the cache.

    ``heads``: query heads, key heads, head_dim. ``norms``: weights ``[head_dim]`` of q and k, eps. ``cache``: keys and
    values of one layer, ``[blocks, kv_heads, block_size, head_dim]`` dense, of y's dtype.
    """
    q_heads, kv_heads, head_dim = heads
    tokens = y.shape[0]
    out = torch.empty((tokens, q_heads, head_dim), dtype=y.dtype, device=y.device)
    if not tokens:
        return out
    half = rope.rotary_dim // 2
    q_norm, k_norm, eps = norms
    programs = q_heads + 2 * kv_heads
    sole = tokens == 1
    streamed = units is not None and not units.largest and (sole or units.streamed)
    operands = (
        y,
        out,
        *cache,
        kv_slots,
        positions,
        rope.cos,
        rope.sin,
        y if q_norm is None else q_norm,
        y if k_norm is None else k_norm,
        y.stride(0),
        programs * head_dim,
        q_heads,
        kv_heads,
        head_dim,
        half,
        cache[0].shape[2],
        eps,
    )
    forms: dict[str, int | bool] = {
        "INTERLEAVED": rope.style == "interleaved",
        "Q_NORM": q_norm is not None,
        "K_NORM": k_norm is not None,
        "HAS_REST": head_dim > 2 * half,
        "BLOCK_R": RANK_BLOCK,
        **early(streamed or lets_at_once(tokens)),
    }

    def blocks(least: int) -> dict[str, int]:
        widths = {"BLOCK": half, "BLOCK_REST": head_dim - 2 * half}
        return {name: max(least, triton.next_power_of_2(max(1, width))) for name, width in widths.items()}

    if h is None or units is None:
        adapted: Pointers = (y, 0, *(y,) * 8)
        rope_cache_kernel[(tokens, programs)](
            *operands, *adapted, LOOP=False, ADAPTED=False, ROWS=1, num_warps=2, **blocks(2), **forms
        )
        return out
    forms["ROWS"] = units.rows
    adapted = pointers(h, units)
    if streamed:
        lone_rope_cache_kernel[(units.most, programs)](
            *operands, *adapted, SOLE=sole, num_warps=LONE_WARPS, **blocks(2), **forms
        )
    else:
        lanes, loop = units.lanes(programs)
        rope_cache_kernel[(lanes, programs)](
            *operands, *adapted, LOOP=loop, ADAPTED=True, num_warps=WARPS, **blocks(16), **forms
        )
    return out
