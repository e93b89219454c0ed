"""Attention over the paged cache and inside segments, by tiles of keys with a running softmax (arXiv 2205.14135).

Scores, probabilities and sums are float32. Batched decode reads tiles of one fixed width from each sequence's first
visible key on, and a tile that a sequence does not reach leaves its sums bit for bit as they were: the longest context
of a batch changes nothing in the other rows. Positions that no query sees are not read. Inside one sequence's prefill a
non-finite value may reach earlier queries of the same call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch

from polyaccel.backend.errors import OperatorError
from polyaccel.backend.kv_cache import KVCache
from polyaccel.backend.step import Step

QUERY_TILE = 256
PREFILL_KEY_TILE = 512
DECODE_KEY_TILE = 128

KeysAndValues = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""``k, v: [batch, keys, kv_heads, head_dim]`` and which queries see them, ``[batch, queries, keys]``; None: all do."""


def write_kv_cache(k: torch.Tensor, v: torch.Tensor, kv: KVCache, layer: int, step: Step) -> None:
    """Store ``k, v: [tokens, kv_heads, head_dim]`` at the step's ``kv_slots``."""
    kv.write(layer, step.tensor("kv_slots"), k, v)


def paged_attention(
    q: torch.Tensor, kv: KVCache, layer: int, step: Step, scale: float, window: int | None = None
) -> torch.Tensor:
    """Causal attention of ``q: [tokens, heads, head_dim]`` over the cache, for prefill, its chunks and decode together.

    Runs of sequences with one token each go through one batched call. Tokens of no sequence, and queries that see no
    key, give zeros.

    Raises:
        OperatorError: q is no float tensor, or its heads are not of the cache's width.
    """
    if q.shape[-1] != kv.spec.head_dim or not q.is_floating_point():
        raise OperatorError.describe("paged_attention", f"q must be heads of {kv.spec.head_dim}", {"q": q})
    inputs = step.input
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    starts = inputs.query_starts.tolist()
    contexts = inputs.context_lengths.tolist()
    for first, last in _runs(starts):
        begin, end = starts[first], starts[last]
        if end == begin or max(contexts[first:last]) == 0:
            continue
        if end - begin == last - first:
            out[begin:end] = _decode(q[begin:end], kv, layer, step, first, contexts[first:last], scale, window)
            continue
        context = contexts[first]
        hidden = max(0, end - begin - context)
        slots = _slots(step.tensor("block_tables")[first : first + 1], _range(0, context, q), kv.spec.block_size)[0]
        out[begin + hidden : end] = _prefill(
            q[begin + hidden : end],
            lambda a, b, slots=slots: kv.read(layer, slots[a:b]),  # type: ignore[misc]
            context,
            scale,
            window,
        )
    return out


def dense_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: Sequence[int], scale: float, causal: bool
) -> torch.Tensor:
    """Attention inside each segment ``starts[i]:starts[i + 1]``; tokens of no segment give zeros.

    Raises:
        OperatorError: an operand is no float tensor.
    """
    operands = {"q": q, "k": k, "v": v}
    if not all(x.is_floating_point() for x in operands.values()):
        raise OperatorError.describe("dense_attention", "q, k and v must be floats", operands)
    out = q.new_zeros((*q.shape[:-1], v.shape[-1]))
    for begin, end in pairwise(starts):
        keys, values = k[begin:end], v[begin:end]

        def read(
            a: int, b: int, keys: torch.Tensor = keys, values: torch.Tensor = values
        ) -> tuple[torch.Tensor, torch.Tensor]:
            return keys[a:b], values[a:b]

        if end > begin:
            out[begin:end] = _prefill(q[begin:end], read, end - begin, scale, None, causal)
    return out


def _runs(starts: list[int]) -> Iterator[tuple[int, int]]:
    """Sequences ``first:last``: maximal runs with one token each, all others alone."""
    first = 0
    while first < len(starts) - 1:
        last = first + 1
        if starts[last] - starts[first] == 1:
            while last < len(starts) - 1 and starts[last + 1] - starts[last] == 1:
                last += 1
        yield first, last
        first = last


def _decode(
    q: torch.Tensor,
    kv: KVCache,
    layer: int,
    step: Step,
    first: int,
    contexts: list[int],
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """One query for each of the sequences ``first:``, which is at the end of its context."""
    end = first + len(contexts)
    tables = step.tensor("block_tables")[first:end]
    ends = step.tensor("context_lengths")[first:end].to(torch.int64).unsqueeze(1)
    begins = torch.zeros_like(ends) if window is None else (ends - window).clamp(min=0)
    longest = max(contexts) if window is None else min(window, max(contexts))

    def tiles() -> Iterator[KeysAndValues]:
        for a in range(0, longest, DECODE_KEY_TILE):
            positions = begins + _range(a, a + DECODE_KEY_TILE, q)
            visible = positions < ends
            # A masked key repeats the last one, which the query sees anyway: what it holds cannot spoil the sum.
            positions = torch.minimum(positions, (ends - 1).clamp(min=0))
            k, v = kv.read(layer, _slots(tables, positions, kv.spec.block_size).flatten())
            shape = positions.shape
            yield k.view(*shape, *k.shape[1:]), v.view(*shape, *v.shape[1:]), visible.unsqueeze(1)

    out = _attend(q.unsqueeze(1), tiles(), scale).squeeze(1)
    if min(contexts) == 0:
        out = torch.where((ends > 0).unsqueeze(-1), out, 0.0)
    return out.to(q.dtype)


def _prefill(
    q: torch.Tensor,
    read: Callable[[int, int], tuple[torch.Tensor, torch.Tensor]],
    context: int,
    scale: float,
    window: int | None,
    causal: bool = True,
) -> torch.Tensor:
    """The last ``q: [queries, heads, head_dim]`` of a sequence of ``context`` keys; ``read(a, b)`` gives those."""
    offset = context - q.shape[0]
    parts = []
    for begin in range(0, q.shape[0], QUERY_TILE):
        end = min(begin + QUERY_TILE, q.shape[0])
        low = 0 if window is None else max(0, offset + begin - window + 1)
        high = offset + end if causal else context

        def tiles(begin: int = begin, end: int = end, low: int = low, high: int = high) -> Iterator[KeysAndValues]:
            queries = _range(offset + begin, offset + end, q).unsqueeze(1)
            for a in range(low, high, PREFILL_KEY_TILE):
                b = min(a + PREFILL_KEY_TILE, high)
                k, v = read(a, b)
                keys = _range(a, b, q)
                visible = keys <= queries if causal else None
                if window is not None:
                    visible = (keys <= queries) & (keys > queries - window)
                yield k.unsqueeze(0), v.unsqueeze(0), None if visible is None else visible.unsqueeze(0)

        parts.append(_attend(q[begin:end].unsqueeze(0), tiles(), scale).squeeze(0))
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).to(q.dtype)


def _attend(q: torch.Tensor, tiles: Iterator[KeysAndValues], scale: float) -> torch.Tensor:
    """Softmax attention of ``q: [batch, queries, heads, head_dim]`` over tiles, float32; NaN where nothing is seen."""
    batch, queries, heads, head_dim = q.shape
    q = q.float()
    total: torch.Tensor | None = None
    top = torch.full((batch, 1, 1, queries, 1), torch.finfo(torch.float32).min, dtype=torch.float32, device=q.device)
    weight = torch.zeros_like(top)
    for k, v, visible in tiles:
        kv_heads, group = k.shape[2], heads // k.shape[2]
        # The query heads of one key head are rows of one product.
        rows = q.view(batch, queries, kv_heads, group, head_dim).permute(0, 2, 3, 1, 4).flatten(2, 3)
        # Contiguous, or the product of a batch of one would take another path with other rounding.
        keys, values = (t.transpose(1, 2).float().contiguous() for t in (k, v))
        scores = (rows @ keys.transpose(2, 3) * scale).view(batch, kv_heads, group, queries, -1)
        if visible is not None:
            scores = scores.masked_fill(~visible[:, None, None], -torch.inf)
        higher = torch.maximum(top, scores.amax(-1, keepdim=True))
        p = torch.exp(scores - higher)
        fade = torch.exp(top - higher)
        summed = (p.flatten(2, 3) @ values).view(batch, kv_heads, group, queries, -1)
        weight = weight * fade + p.sum(-1, keepdim=True)
        total = summed if total is None else total * fade + summed
        top = higher
    if total is None:
        return torch.full_like(q, torch.nan)
    return (total / weight).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _slots(tables: torch.Tensor, positions: torch.Tensor, block_size: int) -> torch.Tensor:
    """KV slots ``[sequences, keys]`` int64 of ``positions: [keys]`` or ``[sequences, keys]``."""
    blocks = torch.div(positions, block_size, rounding_mode="floor")
    blocks = blocks.expand(tables.shape[0], -1)
    return tables.to(torch.int64).gather(1, blocks) * block_size + positions % block_size


def _range(begin: int, end: int, like: torch.Tensor) -> torch.Tensor:
    return torch.arange(begin, end, dtype=torch.int64, device=like.device)
