"""Causal attention of many queries a sequence over the paged cache, tile by tile (arXiv 2307.08691)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from polyaccel_cuda.kernels.softmax import attend_tile

QUERY_TILE = 64


@triton.jit
def prefill_kernel(
    q,
    keys,
    values,
    tables,
    table_starts,
    query_starts,
    contexts,
    tile_sequences,
    tile_begins,
    out,
    q_row,
    q_head,
    kv_heads,
    group,
    head_dim,
    block_size,
    window,
    scale,
    WINDOW: tl.constexpr,
    QUERIES: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    sequence = tl.load(tile_sequences + tl.program_id(0))
    head = tl.program_id(1).to(tl.int64)
    heads = tl.num_programs(1)
    begin = tl.load(tile_begins + tl.program_id(0))
    start = tl.load(query_starts + sequence)
    count = tl.load(query_starts + sequence + 1) - start
    context = tl.load(contexts + sequence)
    kv_head = head // group
    n = begin + tl.arange(0, QUERIES)
    valid = n < count
    # The last query is at the end of the context; those before the first key see nothing.
    index = context - count + n
    rows = (start + n).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = d < head_dim
    mask_q = valid[:, None] & inside[None, :]
    q_tile = tl.load(q + rows[:, None] * q_row + head * q_head + d[None, :], mask=mask_q, other=0.0)
    table = tables + tl.load(table_starts + sequence)
    last = tl.minimum(context, context - count + begin + QUERIES)
    low = 0
    if WINDOW:
        low = tl.maximum(context - count + begin - window + 1, 0) // TILE * TILE
    top = tl.full((QUERIES,), float("-inf"), tl.float32)
    weight = tl.zeros((QUERIES,), tl.float32)
    acc = tl.zeros((QUERIES, BLOCK_D), tl.float32)
    for tile in range(low, last, TILE):
        positions = tile + tl.arange(0, TILE)
        known = positions < last
        if WINDOW:
            # No query of the tile sees what lies before its first one's window.
            known = known & (positions > context - count + begin - window)
        block = tl.load(table + positions // block_size, mask=known, other=0).to(tl.int64)
        where = ((block * kv_heads + kv_head) * block_size + positions % block_size) * head_dim
        where = where[:, None] + d[None, :]
        mask = known[:, None] & inside[None, :]
        seen = known[None, :] & (positions[None, :] <= index[:, None])
        if WINDOW:
            seen = seen & (positions[None, :] > index[:, None] - window)
        top, weight, acc = attend_tile(q_tile, keys, values, where, mask, seen, scale, top, weight, acc)
    y = tl.where((index >= 0)[:, None], acc / weight[:, None], 0.0)
    place = (rows[:, None] * heads + head) * head_dim + d[None, :]
    tl.store(out + place, y.to(out.dtype.element_ty), mask=mask_q)


def prefill(
    q: torch.Tensor,
    cache: tuple[torch.Tensor, torch.Tensor],
    tables: torch.Tensor,
    table_starts: torch.Tensor,
    query_starts: torch.Tensor,
    contexts: torch.Tensor,
    tiles: tuple[torch.Tensor, torch.Tensor],
    scale: float,
    window: int | None,
    out: torch.Tensor,
) -> torch.Tensor:
    """Into ``out: [T, heads, head_dim]`` dense, the rows of the sequences that ``tiles`` name.

    ``tiles``: sequence and first query of each tile of :data:`QUERY_TILE` queries, ``[tiles]`` int32.
    """
    heads, head_dim = q.shape[1], q.shape[2]
    keys, values = cache
    if not len(tiles[0]):
        return out
    block_d = max(16, triton.next_power_of_2(head_dim))
    wide = q.dtype == torch.float32 or block_d > 128
    prefill_kernel[(len(tiles[0]), heads)](
        q,
        keys,
        values,
        tables,
        table_starts,
        query_starts,
        contexts,
        *tiles,
        out,
        q.stride(0),
        q.stride(1),
        keys.shape[1],
        heads // keys.shape[1],
        head_dim,
        keys.shape[2],
        0 if window is None else window,
        scale,
        WINDOW=window is not None,
        QUERIES=QUERY_TILE,
        TILE=32 if wide else 64,
        BLOCK_D=block_d,
        num_warps=8 if wide else 4,
        num_stages=1 if wide else 2,
    )
    return out
