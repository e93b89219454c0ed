"""Attention over the paged cache by torch's batched products (float32 decode) and its flash kernel (all else)."""

from __future__ import annotations

import torch
from torch.nn.functional import embedding_bag

from polyaccel.backend.cpu.attention_plan import AttentionPlan, Prefill
from polyaccel.backend.cpu.decode_plan import DecodeBatch, KeysInPlace
from polyaccel.backend.cpu.kv_cache import HeadMajorKVCache

# Bounds the mask and lets a tile skip the keys that none of its queries sees.
QUERY_TILE = 512


def paged_attention(
    q: torch.Tensor, kv: HeadMajorKVCache, layer: int, plan: AttentionPlan, scale: float
) -> torch.Tensor:
    """Attention of ``q: [T, heads, head_dim]`` (rows dense); returns the same shape, contiguous.

    Tokens of no sequence and queries that see no key give zeros.
    """
    pieces: list[tuple[int, int, torch.Tensor]] = []
    for batch in plan.decode_batches(q.dtype):
        pieces.append((batch.begin, batch.end, _decode(q, kv, layer, batch, scale)))
    pieces += [(p.begin, p.end, _prefill(q, kv, layer, plan, p, scale)) for p in plan.prefills]
    if plan.covered and len(pieces) == 1:
        return pieces[0][2]
    out = torch.empty(q.shape, dtype=q.dtype) if plan.covered else torch.zeros(q.shape, dtype=q.dtype)
    for begin, end, piece in pieces:
        out[begin:end] = piece
    return out


def _decode(q: torch.Tensor, kv: HeadMajorKVCache, layer: int, batch: DecodeBatch, scale: float) -> torch.Tensor:
    """One query of each sequence, ``[sequences, heads, head_dim]``."""
    spec, sequences, head_dim = kv.spec, batch.end - batch.begin, kv.spec.head_dim
    rows, matrices = q[batch.begin : batch.end], (sequences * spec.kv_heads, batch.keys, head_dim)
    if len(batch.matrices):
        copies = kv.copies(layer, batch.matrices)
        k, v = copies[: matrices[0] * batch.keys], copies[-matrices[0] * batch.keys :]
    if batch.hidden is not None:
        # A hidden infinity times a probability of 0 would be NaN.
        v.index_fill_(0, batch.hidden, 0.0)
    if q.dtype == torch.float32:
        if batch.keys_in_place is not None:
            scores = _scores_in_place(rows, kv, layer, batch.keys_in_place, scale)
        else:
            # The query heads of one key head are rows of one product.
            scores = _scores(rows.reshape(matrices[0], -1, head_dim), k.view(matrices), scale)
        if batch.hidden_scores is not None:
            scores.view(-1).index_fill_(0, batch.hidden_scores, -torch.inf)
        p = torch.softmax(scores.view(matrices[0], -1, batch.keys), -1)
        where = batch.values_in_place
        if where is not None:
            values = kv.values(layer).view(-1, head_dim)
            summed = embedding_bag(where.rows, values, where.bags, mode="sum", per_sample_weights=p.view(-1))
            return summed.view(sequences, -1, head_dim)
        return torch.bmm(p, v.view(matrices)).view(sequences, -1, head_dim)
    if batch.hidden is not None:
        k.index_fill_(0, batch.hidden, 0.0)
    shape = (sequences, spec.kv_heads, -1, head_dim)
    out = _flash(rows.reshape(shape), k.view(shape), v.view(shape), scale, mask=batch.mask)
    return out.reshape(sequences, -1, head_dim)


def _scores_in_place(
    q: torch.Tensor, kv: HeadMajorKVCache, layer: int, where: KeysInPlace, scale: float
) -> torch.Tensor:
    """Scores ``[sequences * heads * blocks, block_size]`` from keys that are not copied."""
    size, head_dim = kv.spec.block_size, kv.spec.head_dim
    k = kv.keys(layer)[where.first : where.first + where.blocks].view(-1, size, head_dim)
    rows = q.index_select(0, where.owner).view(len(k), -1, head_dim)
    return _scores(rows, k, scale).view(-1, size).index_select(0, where.order)


def _prefill(
    q: torch.Tensor, kv: HeadMajorKVCache, layer: int, plan: AttentionPlan, piece: Prefill, scale: float
) -> torch.Tensor:
    """Several queries of each of some sequences, ``[sequences * queries, heads, head_dim]``."""
    kv_heads, head_dim = kv.spec.kv_heads, kv.spec.head_dim
    sequences, queries, keys = piece.sequences, piece.queries, piece.keys
    group = q.shape[1] // kv_heads
    # One matrix a sequence and key head; its query heads share it without a copy.
    copies = kv.copies(layer, piece.matrices).view(2, sequences * kv_heads, 1, -1, head_dim)
    k, v = copies.expand(-1, -1, group, -1, -1).unbind()
    shape = (sequences, queries, kv_heads, group, head_dim)
    rows = q[piece.begin : piece.end].view(shape).permute(0, 2, 3, 1, 4).flatten(0, 1)
    if queries == keys and (plan.window is None or plan.window >= keys):
        return _to_rows(_flash(rows, k[:, :, :keys], v[:, :, :keys], scale, causal=True), sequences)
    mask = plan.mask(min(QUERY_TILE, max(p.queries for p in plan.prefills)), q.dtype)
    out = torch.empty_like(rows)
    for begin in range(0, queries, QUERY_TILE):
        end = min(begin + QUERY_TILE, queries)
        # Keys up to the tile's last query; with a window, from the first one that its first query sees.
        high = keys - queries + end
        low = 0 if plan.window is None else max(0, keys - queries + begin + 1 - plan.window)
        own = mask[mask.shape[0] - (end - begin) :, mask.shape[1] - (high - low) :]
        out[:, :, begin:end] = _flash(rows[:, :, begin:end], k[:, :, low:high], v[:, :, low:high], scale, mask=own)
    return _to_rows(out, sequences)


def _scores(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """``scale * q @ k.T`` for ``[matrices, rows, head_dim]``, one pass."""
    return torch.baddbmm(q.new_empty((1, 1, 1)), q, k.transpose(1, 2), beta=0, alpha=scale)


def _to_rows(out: torch.Tensor, sequences: int) -> torch.Tensor:
    """``[sequences * kv_heads, group, queries, head_dim]`` as ``[sequences * queries, heads, head_dim]``."""
    matrices, group, queries, head_dim = out.shape
    shape = (sequences, matrices // sequences, group, queries, head_dim)
    return out.view(shape).permute(0, 3, 1, 2, 4).reshape(sequences * queries, -1, head_dim)


def _flash(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    *,
    causal: bool = False,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    out: torch.Tensor = kernel(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)[0]
    # The kernel takes a query whose scores are NaN or minus infinity for one that sees nothing, and gives zeros.
    out.add_((q * 0).sum(-1, keepdim=True))
    return out
