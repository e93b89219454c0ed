"""Attention of one query a sequence on paged keys, all sequences at once: the step that a decoding model repeats."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from .descriptor import Tensor
from .refusal import inner

_PADDED = 2  # how many times their keys sequences may be padded to, to be computed at once


def named_blocks(table: list[list[int]], lengths: Sequence[int], block_size: int, limit: int) -> list[list[int]]:
    """The blocks of each sequence, as many as its length needs, of a cache that has `limit`."""
    found = [row[: -(-length // block_size)] for row, length in zip(table, lengths, strict=True)]
    for blocks in found:
        if blocks and (min(blocks) < 0 or max(blocks) >= limit):
            # FusedInfer, page attention: "block ids are not checked, the caller guarantees them": a card reads wild
            # memory.
            raise inner(f"blockTable names blocks {blocks}, but the cache has {limit}.")
    return found


class Decode:
    """A problem of one query a sequence, without a mask.

    An operator of torch costs more than its arithmetic here, so there are few of them; what does not follow from the
    lengths is made once.

    lse: [B, N, 1, 1], the log-sum-exp, if it is wanted.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor | None,
        block_table: Tensor,
        block_size: int,
        key_heads: int,
        width: int,
        scale: float,
    ) -> None:
        self._table = block_table.view()
        self._size, self._heads, self._width = block_size, key_heads, width
        self._count = self._table.shape[0]
        # With one query a sequence all layouts are one.
        self._query = query.view().view(self._count * key_heads, -1, width)
        self._key, self._value, self._out = key.view(), value.view(), out.view()
        if key_heads == 1:  # and heads first or rows first is one
            self._key, self._value = (x.view(x.shape[0], block_size, width) for x in (self._key, self._value))
        self._lse = None if lse is None else lse.view()
        self._blocks = self._key.shape[0]
        # With an axis of its own it widens the query that it multiplies.
        self._scale = torch.tensor([scale], dtype=torch.float32)

    def __call__(self, lengths: tuple[int, ...]) -> bool:
        """Compute it; or False, and nothing is written, for lengths too unlike one another."""
        most, least = max(lengths, default=0), min(lengths, default=0)
        if not least:
            return False
        # Nothing made in here outlives it, and inference mode spares each operator of torch a third of its way.
        with torch._C._InferenceMode(True):
            longest = -(-most // self._size)
            picked = self._picked(lengths, longest)
            if picked is None:
                return False
            key = self._by_head(self._key, picked, most, longest == 1)
            value = self._by_head(self._value, picked, most, longest == 1)
            scores = torch.bmm(self._query.mul(self._scale), key.transpose(1, 2))
            hidden = None
            if least < most:
                own = lengths if self._heads == 1 else np.repeat(lengths, self._heads)
                hidden = torch.from_numpy(np.arange(most) >= np.array(own)[:, None, None])
                scores.masked_fill_(hidden, float("-inf"))
            if self._lse is not None:
                self._lse.copy_(torch.logsumexp(scores, -1).view(self._lse.shape))
            weights = torch.softmax(scores, -1)
            result = torch.bmm(weights, value)
            if hidden is not None and not math.isfinite(result.sum().item()):
                # What lies past a length may be anything, and weighs nothing unless zero times it is NaN.
                result = torch.bmm(weights, value.masked_fill_(hidden.transpose(1, 2), 0.0))
            self._out.copy_(result.view(self._out.shape))
        return True

    def _picked(self, lengths: tuple[int, ...], longest: int) -> torch.Tensor | None:
        """Every sequence's blocks, `longest` of them each; None where that were too many for what they hold."""
        if longest > 1:
            needed = sum([-(-length // self._size) for length in lengths])
            if longest * self._count > _PADDED * needed:
                return None
        table = self._table
        flat = (table if table.shape[1] == longest else table.narrow(1, 0, longest)).reshape(-1)
        named = flat.tolist()
        if min(named) >= 0 and max(named) < self._blocks:
            return flat
        # What the table has past a length may be anything: the first block again in its place.
        found = named_blocks(table.tolist(), lengths, self._size, self._blocks)
        return torch.tensor([block for own in found for block in (*own, *own[:1] * (longest - len(own)))])

    def _by_head(self, whole: torch.Tensor, picked: torch.Tensor, most: int, one: bool) -> torch.Tensor:
        """[B * KVN, most, D] in float32 from a cache's blocks, of which each sequence has `one` or more."""
        heads, count, width = self._heads, self._count, self._width
        found = (whole.narrow(-2, 0, most) if one else whole).index_select(0, picked)
        if heads > 1 and whole.ndim == 3:
            found = found.view(count, -1, heads, width).transpose(1, 2).contiguous()
        elif heads > 1 and not one:
            found = found.view(count, -1, heads, self._size, width).transpose(1, 2).contiguous()
        wide = found.float()
        if heads > 1 or not one:
            wide = wide.view(count * heads, -1, width)
        return wide if one else wide.narrow(1, 0, most)
