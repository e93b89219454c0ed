"""What the attention operators compute once a call is known to be legal: layouts, block tables, masks, softmax."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .attention_decode import Decode, named_blocks
from .descriptor import Tensor
from .refusal import inner

UNBOUNDED = 2147483647  # the documents' "INT_MAX" for pre_tokens and next_tokens
COMPRESSED = 2048  # the side of the mask that stands for a causal one of any size

DEFAULT, ALL_MASK, LEFT_UP, RIGHT_DOWN, BAND = range(5)
"""sparse_mode (FusedInfer, sparseMode): mask and band; mask; causal from the left; causal from the right; band."""


@dataclass(slots=True)
class Problem:
    """One attention call but for its lists of lengths, checked. After that only `decode` changes, once: the
    first decode step makes it, and those that differ in their lengths alone find it.

    Layouts: "BSH", "BSND", "BNSD", "BNSD_BSND", "TND". `block_table` is None for keys that are laid out like the query.
    `batch` is 0 in TND; `span`: rows of the query's S or T; `extent`: keys that a sequence has room for, T in TND.
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
    batch: int
    span: int
    extent: int
    scale: float
    sparse_mode: int
    before: int
    after: int
    decode: Decode | None = None


def _batched(x: torch.Tensor, layout: str, heads: int) -> torch.Tensor:
    """A view [B, S, N, D] of any layout but TND."""
    if layout == "BSH":
        return x.view(x.shape[0], x.shape[1], heads, -1)
    return x.transpose(1, 2) if layout == "BNSD" else x


def _cut(x: torch.Tensor, lengths: tuple[int, ...]) -> list[torch.Tensor]:
    return list(torch.ops.aten.split_with_sizes(x[: sum(lengths)], list(lengths)))


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


def compute(problem: Problem, rows: tuple[int, ...], lengths: tuple[int, ...]) -> None:
    """Write `out` (and `lse`): softmax(scale q k^T) v in float32, rounded once.

    rows, lengths: each sequence's queries and keys, not cumulative. Rows past a sequence's queries are not written. A
    row with every key masked gives zeros (the documents' "row invalid" correction).
    """
    tnd = problem.layout == "TND"
    if problem.block_table is not None and problem.mask is None and problem.span == 1 and lengths and not tnd:
        decode = problem.decode
        if decode is None:
            decode = problem.decode = Decode(
                *(problem.query, problem.key, problem.value, problem.out, problem.lse, problem.block_table),
                *(problem.block_size, problem.key_heads, problem.width, problem.scale),
            )
        if decode(lengths):
            return
    layout = "BNSD" if problem.layout == "BNSD_BSND" else problem.layout
    out_layout = "BSND" if problem.layout == "BNSD_BSND" else layout
    query, out, key, value = (one.view() for one in (problem.query, problem.out, problem.key, problem.value))
    lse = problem.lse.view() if problem.lse is not None else None
    blocks = None
    if problem.block_table is not None:
        blocks = named_blocks(problem.block_table.view().tolist(), lengths, problem.block_size, key.shape[0])
    queries = _cut(query, rows) if tnd else list(_batched(query, layout, problem.heads))
    outs = _cut(out, rows) if tnd else list(_batched(out, out_layout, problem.heads))
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
            found += _cut(whole, lengths) if tnd else _batched(whole, layout, problem.key_heads)
    first = 0
    for i, (count, length) in enumerate(zip(rows, lengths, strict=True)):
        if blocks is not None:
            own = torch.tensor(blocks[i], dtype=torch.int64)
            k, v = (_gathered(whole, own, problem.key_heads)[:length] for whole in (key, value))
        else:
            k, v = keys[i][:length], values[i][:length]
        if count:
            result, logsum = _one(problem, i, queries[i][:count], k, v, dense)
            outs[i][:count].copy_(result)
            if lse is not None and tnd:
                lse[first : first + count, :, 0].copy_(logsum.T)
            elif lse is not None:
                lse[i, :, :count, 0].copy_(logsum)
        first += count


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
