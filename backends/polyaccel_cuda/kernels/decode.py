"""Attention of one query a sequence over the paged cache: keys in splits, then one combination (arXiv 2205.14135).

How many splits there are depends on what a launch is captured for, never on the contexts: a sequence's splits are even
shares of its own context.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from polyaccel_cuda.kernels.early import early, follow, lets_at_once
from polyaccel_cuda.kernels.softmax import attend_tile

# Enough programs that every multiprocessor of a large chip has several.
PROGRAMS = 528
MOST_SPLITS = 64


@triton.jit
def decode_kernel(
    q,
    keys,
    values,
    tables,
    table_starts,
    contexts,
    out,
    sums,
    q_row,
    q_head,
    kv_heads,
    group,
    head_dim,
    block_size,
    window,
    scale,
    splits,
    WINDOW: tl.constexpr,
    DIRECT: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EARLY: tl.constexpr,
):
    follow(EARLY)
    sequence = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    context = tl.load(contexts + sequence)
    low = 0
    if WINDOW:
        low = tl.maximum(context - window, 0)
    first = low // TILE
    tiles = tl.cdiv(context, TILE) - first
    share = tl.cdiv(tiles, splits)
    begin = first + split * share
    end = tl.minimum(begin + share, first + tiles)
    heads = kv_head * group + tl.arange(0, GROUP)
    known = tl.arange(0, GROUP) < group
    d = tl.arange(0, BLOCK_D)
    inside = d < head_dim
    q_tile = tl.load(
        q + sequence * q_row + heads[:, None] * q_head + d[None, :], mask=known[:, None] & inside[None, :], other=0.0
    )
    table = tables + tl.load(table_starts + sequence)
    top = tl.full((GROUP,), float("-inf"), tl.float32)
    weight = tl.zeros((GROUP,), tl.float32)
    acc = tl.zeros((GROUP, BLOCK_D), tl.float32)
    for tile in range(begin, end):
        positions = tile * TILE + tl.arange(0, TILE)
        seen = (positions >= low) & (positions < context)
        block = tl.load(table + positions // block_size, mask=seen, other=0).to(tl.int64)
        rows = ((block * kv_heads + kv_head) * block_size + positions % block_size) * head_dim
        where = rows[:, None] + d[None, :]
        mask = seen[:, None] & inside[None, :]
        top, weight, acc = attend_tile(q_tile, keys, values, where, mask, seen[None, :], scale, top, weight, acc)
    index = sequence * kv_heads * group + heads
    mask = known[:, None] & inside[None, :]
    if DIRECT:
        y = tl.where(context > 0, acc / weight[:, None], 0.0)
        tl.store(out + index[:, None] * head_dim + d[None, :], y.to(out.dtype.element_ty), mask=mask)
    else:
        place = index * splits + split
        tl.store(out + place[:, None] * head_dim + d[None, :], acc, mask=mask)
        tl.store(sums + 2 * place, top, mask=known)
        tl.store(sums + 2 * place + 1, weight, mask=known)


@triton.jit
def combine_kernel(
    parts,
    sums,
    contexts,
    out,
    heads,
    head_dim,
    splits,
    SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EARLY: tl.constexpr,
):
    follow(EARLY)
    index = tl.program_id(0).to(tl.int64)
    context = tl.load(contexts + index // heads)
    s = tl.arange(0, SPLITS)
    known = s < splits
    d = tl.arange(0, BLOCK_D)
    inside = d < head_dim
    place = index * splits + s
    top = tl.load(sums + 2 * place, mask=known, other=float("-inf"))
    weight = tl.load(sums + 2 * place + 1, mask=known, other=0.0)
    highest = tl.max(top, 0)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    fade = tl.exp(top - base)
    # A split without keys has no weight; what its sums hold is zero.
    parts_tile = tl.load(
        parts + place[:, None] * head_dim + d[None, :], mask=known[:, None] & inside[None, :], other=0.0
    )
    total = tl.sum(parts_tile * fade[:, None], 0)
    y = tl.where(context > 0, total / tl.sum(weight * fade, 0), 0.0)
    tl.store(out + index * head_dim + d, y.to(out.dtype.element_ty), mask=inside)


def splits_for(sequences: int, kv_heads: int, longest: int) -> int:
    """Shares of a context; ``longest`` is what a launch must ever serve, not what it serves now."""
    wanted = -(-PROGRAMS // max(1, sequences * kv_heads))
    return max(1, min(wanted, MOST_SPLITS, -(-longest // 128)))


def decode(
    q: torch.Tensor,
    cache: tuple[torch.Tensor, torch.Tensor],
    tables: torch.Tensor,
    table_starts: torch.Tensor,
    contexts: torch.Tensor,
    scale: float,
    window: int | None,
    splits: int,
    out: torch.Tensor,
) -> torch.Tensor:
    """Into ``out: [sequences, heads, head_dim]`` dense; a sequence without context gives zeros.

    ``q`` as out, last dimension dense. ``cache``: keys and values ``[blocks, kv_heads, block_size, head_dim]``.
    ``tables: [entries]`` int32, ``table_starts, contexts: [sequences]`` int32.
    """
    sequences, heads, head_dim = q.shape
    keys, values = cache
    kv_heads = keys.shape[1]
    if not sequences:
        return out
    direct = splits == 1
    parts, sums = out, out
    if not direct:
        parts = torch.empty((sequences * heads, splits, head_dim), dtype=torch.float32, device=q.device)
        sums = torch.empty((sequences * heads, splits, 2), dtype=torch.float32, device=q.device)
    block_d = max(16, triton.next_power_of_2(head_dim))
    wide = q.dtype == torch.float32 or block_d > 128
    decode_kernel[(sequences, kv_heads, splits)](
        q,
        keys,
        values,
        tables,
        table_starts,
        contexts,
        parts,
        sums,
        q.stride(0),
        q.stride(1),
        kv_heads,
        heads // kv_heads,
        head_dim,
        keys.shape[2],
        0 if window is None else window,
        scale,
        splits,
        WINDOW=window is not None,
        DIRECT=direct,
        GROUP=max(16, triton.next_power_of_2(heads // kv_heads)),
        TILE=32 if wide else 64,
        BLOCK_D=block_d,
        num_warps=4,
        num_stages=2 if wide else 3,
        **early(lets_at_once(sequences)),
    )
    if not direct:
        combine_kernel[(sequences * heads,)](
            parts,
            sums,
            contexts,
            out,
            heads,
            head_dim,
            splits,
            SPLITS=triton.next_power_of_2(splits),
            BLOCK_D=block_d,
            num_warps=4,
            **early(lets_at_once(sequences)),
        )
    return out
