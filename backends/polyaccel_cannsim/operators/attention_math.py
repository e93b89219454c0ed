"""What the attention operators compute once a call is known to be legal: layouts, block tables, masks, softmax."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from .descriptor import Tensor
from .refusal import inner

UNBOUNDED = 2147483647  # the documents' "INT_MAX" for pre_tokens and next_tokens
COMPRESSED = 2048  # the side of the mask that stands for a causal one of any size

_PADDED = 2  # how many times their keys sequences may be padded to, to be computed at once

DEFAULT, ALL_MASK, LEFT_UP, RIGHT_DOWN, BAND = range(5)
"""sparse_mode (FusedInfer, sparseMode): mask and band; mask; causal from the left; causal from the right; band."""


@dataclass(slots=True)
class Problem:
    """One attention call, checked, and not changed after that.

    Layouts: "BSH", "BSND", "BNSD", "BNSD_BSND", "TND". `query_lengths`, `key_lengths`: per sequence, not cumulative.
    `block_table` is None for keys that are laid out like the query.
    """

    layout: str
    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    lse: Tensor | None
    mask: Tensor | None
    block_table: Tensor | None
    block_size: int
    heads: int
    key_heads: int
    width: int
    scale: float
    sparse_mode: int
    before: int
    after: int
    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]


def _batched(x: torch.Tensor, layout: str, heads: int) -> torch.Tensor:
    """A view [B, S, N, D] of any layout but TND."""
    if layout == "BSH":
        return x.view(x.shape[0], x.shape[1], heads, -1)
    return x.transpose(1, 2) if layout == "BNSD" else x


def _cut(x: torch.Tensor, lengths: tuple[int, ...]) -> list[torch.Tensor]:
    return list(torch.ops.aten.split_with_sizes(x[: sum(lengths)], list(lengths)))


def _blocks(problem: Problem, limit: int) -> list[list[int]]:
    """The blocks of each sequence, as many as its length needs."""
    assert problem.block_table is not None
    size = problem.block_size
    rows = problem.block_table.view().tolist()
    found = [row[: -(-length // size)] for row, length in zip(rows, problem.key_lengths, strict=True)]
    named = [block for blocks in found for block in blocks]
    if named and (min(named) < 0 or max(named) >= limit):
        # FusedInfer, page attention: "block ids are not checked, the caller guarantees them": a card reads wild memory.
        wild = next(blocks for blocks in found if blocks and (min(blocks) < 0 or max(blocks) >= limit))
        raise inner(f"blockTable names blocks {wild}, but the cache has {limit}.")
    return found


def _gathered(whole: torch.Tensor, blocks: torch.Tensor, heads: int) -> torch.Tensor:
    """[rows of the blocks, heads, D] from [blocks, block_size, heads * D] or [blocks, heads, block_size, D]."""
    picked = whole.index_select(0, blocks)
    if whole.ndim == 3:
        return picked.view(-1, heads, whole.shape[-1] // heads)
    return picked.transpose(1, 2).reshape(-1, heads, whole.shape[-1])


def _check_compressed(mask: torch.Tensor) -> None:
    """FusedInfer, sparse_mode 2, 3, 4: the caller guarantees a causal mask, True (1) above the diagonal.

    The corners and the two diagonals are looked at: enough to tell an inverted, empty or full mask.
    """
    flat = mask.reshape(COMPRESSED, COMPRESSED).to(torch.bool)
    if (
        bool(flat.diagonal().any())
        or not bool(flat.diagonal(1).all())
        or bool(flat[-1].any())
        or not bool(flat[0, 1:].all())
    ):
        raise inner("attenMask must be 0 up to the diagonal and 1 above it for sparseMode 2, 3 and 4.")


def _hidden(problem: Problem, index: int, queries: int, keys: int, dense: torch.Tensor | None) -> torch.Tensor | None:
    """[queries, keys] or broadcastable, True where a key is masked; None where nothing is."""
    mode = problem.sparse_mode
    if mode in (DEFAULT, ALL_MASK) and dense is None:
        return None
    rows = torch.arange(queries)[:, None]
    columns = torch.arange(keys)[None, :]
    if mode == LEFT_UP:
        return columns > rows
    if mode == RIGHT_DOWN:
        return columns > rows + (keys - queries)
    if mode == BAND:
        centre = rows + (keys - queries)
        return (columns < centre - problem.before) | (columns > centre + problem.after)
    assert dense is not None
    one = dense.reshape(-1, *dense.shape[-2:])
    hidden = one[index if one.shape[0] > 1 else 0][-queries if dense.shape[-2] == 1 else 0 :][:queries, :keys]
    if mode == DEFAULT and (problem.before != UNBOUNDED or problem.after != UNBOUNDED):
        hidden = hidden | (columns < rows - problem.before) | (columns > rows + problem.after)
    return hidden


def compute(problem: Problem) -> None:
    """Write `out` (and `lse`): softmax(scale q k^T) v in float32, rounded once.

    Rows past a sequence's length are not written. A row with every key masked gives zeros (the documents' "row
    invalid" correction).
    """
    tnd = problem.layout == "TND"
    layout = "BNSD" if problem.layout == "BNSD_BSND" else problem.layout
    out_layout = "BSND" if problem.layout == "BNSD_BSND" else layout
    query, out, key, value = (one.view() for one in (problem.query, problem.out, problem.key, problem.value))
    lse = problem.lse.view() if problem.lse is not None else None
    blocks = _blocks(problem, key.shape[0]) if problem.block_table is not None else None
    if blocks is not None and not tnd and _alike(problem, blocks):
        # Nothing made in here outlives it, and inference mode spares each operator of torch a third of its way.
        with torch._C._InferenceMode(True):
            # With one query a sequence all layouts are one.
            out.copy_(_decoded(problem, query, key, value, blocks, lse).view(out.shape))
        return
    queries = _cut(query, problem.query_lengths) if tnd else list(_batched(query, layout, problem.heads))
    outs = _cut(out, problem.query_lengths) if tnd else list(_batched(out, out_layout, problem.heads))
    dense: torch.Tensor | None = None
    if problem.mask is not None:
        if problem.sparse_mode in (LEFT_UP, RIGHT_DOWN, BAND):
            _check_compressed(problem.mask.view())
        else:
            dense = problem.mask.view().to(torch.bool)
    keys: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    if blocks is None:
        for found, whole in ((keys, key), (values, value)):
            found += _cut(whole, problem.key_lengths) if tnd else _batched(whole, layout, problem.key_heads)
    first = 0
    for i, (rows, length) in enumerate(zip(problem.query_lengths, problem.key_lengths, strict=True)):
        if blocks is not None:
            own = torch.tensor(blocks[i], dtype=torch.int64)
            k, v = (_gathered(whole, own, problem.key_heads)[:length] for whole in (key, value))
        else:
            k, v = keys[i][:length], values[i][:length]
        if rows:
            result, logsum = _one(problem, i, queries[i][:rows], k, v, dense)
            outs[i][:rows].copy_(result)
            if lse is not None and tnd:
                lse[first : first + rows, :, 0].copy_(logsum.T)
            elif lse is not None:
                lse[i, :, :rows, 0].copy_(logsum)
        first += rows


def _alike(problem: Problem, blocks: list[list[int]]) -> bool:
    """Whether all sequences are one query that sees all its keys, of lengths so near that they may as well be one."""
    if problem.mask is not None or not blocks or set(problem.query_lengths) != {1} or not min(problem.key_lengths):
        return False
    counts = [len(own) for own in blocks]
    return max(counts) * len(counts) <= _PADDED * sum(counts)


def _padded(problem: Problem, blocks: list[list[int]], longest: int) -> torch.Tensor:
    """Every sequence's blocks, `longest` of them each: the first again for those that are missing."""
    assert problem.block_table is not None
    if longest * len(blocks) == sum(map(len, blocks)):
        table = problem.block_table.view()
        return (table if table.shape[1] == longest else table.narrow(1, 0, longest)).reshape(-1)
    return torch.tensor([block for own in blocks for block in (*own, *own[:1] * (longest - len(own)))])


def _decoded(
    problem: Problem,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    blocks: list[list[int]],
    lse: torch.Tensor | None,
) -> torch.Tensor:
    """All sequences at once, with as few operators of torch as it takes: each costs more than its arithmetic here.

    query: a contiguous [B, 1, N, D] or the like; returns [B * KVN, N / KVN, D] and writes the log-sum-exp to `lse`
    [B, N, 1, 1] if there is one.
    """
    longest, count, heads = max(map(len, blocks)), len(blocks), problem.key_heads
    lengths, most, width = problem.key_lengths, max(problem.key_lengths), problem.width
    picked = _padded(problem, blocks, longest)

    def by_head(whole: torch.Tensor) -> torch.Tensor:
        """[count * heads, most, D] in float32 from a cache's blocks."""
        if longest == 1:
            whole = whole.narrow(-2, 0, most)
        found = whole.index_select(0, picked)
        if heads > 1 and whole.ndim == 3:
            found = found.view(count, -1, heads, width).transpose(1, 2).contiguous()
        elif heads > 1 and longest > 1:
            found = found.view(count, longest, heads, -1, width).transpose(1, 2).contiguous()
        wide = found.float().view(count * heads, -1, width)
        return wide.narrow(1, 0, most) if longest > 1 else wide

    wide_q, wide_k, wide_v = query.float().view(count * heads, -1, width), by_head(key), by_head(value)
    scores = torch.bmm(wide_q, wide_k.transpose(1, 2)).mul_(problem.scale)
    if min(lengths) < most:
        hidden = torch.from_numpy(np.arange(most) >= np.repeat(lengths, heads)[:, None])
        scores.masked_fill_(hidden.unsqueeze(1), float("-inf"))
    if lse is not None:
        lse.copy_(torch.logsumexp(scores, -1).view(lse.shape))
    weights = torch.softmax(scores, -1)
    result = torch.bmm(weights, wide_v)
    if min(lengths) < most and not math.isfinite(result.sum().item()):
        # What lies past a length may be anything, and weighs nothing unless zero times it is NaN.
        result = torch.bmm(weights, wide_v.masked_fill(hidden.unsqueeze(2), 0.0))
    return result


def _one(
    problem: Problem, index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dense: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """One sequence. q: [Q, N, D], k and v: [K, KVN, D]; returns [Q, N, D] and the log-sum-exp [N, Q]."""
    rows, keys = q.shape[0], k.shape[0]
    group = problem.heads // problem.key_heads
    if not keys:
        return torch.zeros(rows, problem.heads, v.shape[-1]), torch.full((problem.heads, rows), float("inf"))
    wide_q = q.to(torch.float32).transpose(0, 1).reshape(problem.key_heads, group * rows, -1)
    scores = (wide_q @ k.to(torch.float32).permute(1, 2, 0)) * problem.scale
    scores = scores.view(problem.heads, rows, keys)
    hidden = _hidden(problem, index, rows, keys, dense)
    if hidden is not None:
        scores = scores.masked_fill(hidden, float("-inf"))
    logsum = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - logsum[..., None])
    if hidden is not None:
        weights = torch.nan_to_num(weights, nan=0.0) if bool(hidden.all(-1).any()) else weights
    result = weights.view(problem.key_heads, group * rows, keys) @ v.to(torch.float32).transpose(0, 1)
    return result.view(problem.heads, rows, -1).transpose(0, 1), logsum
