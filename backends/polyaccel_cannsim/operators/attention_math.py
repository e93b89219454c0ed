"""What the attention operators compute once a call is known to be legal: layouts, block tables, masks, softmax."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .descriptor import Tensor
from .refusal import inner

UNBOUNDED = 2147483647  # the documents' "INT_MAX" for pre_tokens and next_tokens
COMPRESSED = 2048  # the side of the mask that stands for a causal one of any size

DEFAULT, ALL_MASK, LEFT_UP, RIGHT_DOWN, BAND = range(5)
"""sparse_mode (FusedInfer, sparseMode): mask and band; mask; causal from the left; causal from the right; band."""


@dataclass(frozen=True)
class Problem:
    """One attention call, checked.

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


def _sequences(x: torch.Tensor, layout: str, heads: int) -> list[torch.Tensor]:
    """Views [S, N, D] of each sequence, longest extent; TND is cut by the caller."""
    if layout == "BSH":
        return list(x.view(x.shape[0], x.shape[1], heads, -1))
    if layout == "BNSD":
        return [one.transpose(0, 1) for one in x]
    return list(x)


def _cut(x: torch.Tensor, lengths: tuple[int, ...]) -> list[torch.Tensor]:
    return list(torch.ops.aten.split_with_sizes(x[: sum(lengths)], list(lengths)))


def _paged(cache: Tensor, table: torch.Tensor, length: int, block_size: int, heads: int) -> torch.Tensor:
    """[length, heads, D] gathered from [blocks, block_size, heads * D] or [blocks, heads, block_size, D]."""
    whole = cache.view()
    needed = -(-length // block_size)
    blocks = table[:needed].to(torch.int64)
    if needed and (int(blocks.min()) < 0 or int(blocks.max()) >= whole.shape[0]):
        # FusedInfer, page attention: "block ids are not checked, the caller guarantees them": a card reads wild memory.
        raise inner(f"blockTable names blocks {blocks.tolist()}, but the cache has {whole.shape[0]}.")
    picked = whole[blocks]
    if whole.ndim == 4:
        picked = picked.transpose(1, 2)
    return picked.reshape(needed * block_size, heads, -1)[:length]


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
    query, out = problem.query.view(), problem.out.view()
    queries = _cut(query, problem.query_lengths) if tnd else _sequences(query, layout, problem.heads)
    out_layout = "BSND" if problem.layout == "BNSD_BSND" else layout
    outs = _cut(out, problem.query_lengths) if tnd else _sequences(out, out_layout, problem.heads)
    dense: torch.Tensor | None = None
    if problem.mask is not None:
        if problem.sparse_mode in (LEFT_UP, RIGHT_DOWN, BAND):
            _check_compressed(problem.mask.view())
        else:
            dense = problem.mask.view().to(torch.bool)
    tables = problem.block_table.view() if problem.block_table is not None else None
    keys: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    if tables is None:
        for found, source in ((keys, problem.key), (values, problem.value)):
            whole = source.view()
            found += _cut(whole, problem.key_lengths) if tnd else _sequences(whole, layout, problem.key_heads)
    lse = problem.lse.view() if problem.lse is not None else None
    first = 0
    for i, (rows, length) in enumerate(zip(problem.query_lengths, problem.key_lengths, strict=True)):
        if tables is not None:
            k = _paged(problem.key, tables[i], length, problem.block_size, problem.key_heads)
            v = _paged(problem.value, tables[i], length, problem.block_size, problem.key_heads)
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
