"""The four numbers of an adapted module, kept apart, and the scale that depends on two of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from polyaccel.backend.errors import AdapterIncompatible

MAX_RANK = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class RankNumbers:
    """Alpha and the ranks of one module's adapter; immutable, so that no later stage can change what the scale came
    from.

    ``true_rank`` is the rank that was trained (the tensors' own shape), ``padded_rank`` what a backend's layout
    rounds it up to, ``shard_rank`` the part of the padded rank that one device rank holds. ``scale`` is ``alpha /
    true_rank``, or ``alpha / sqrt(true_rank)`` for rank-stabilised LoRA (arXiv:2312.03732), computed once by
    :meth:`of`.
    """

    alpha: float
    true_rank: int
    padded_rank: int
    shard_rank: int
    scale: float

    @classmethod
    def of(cls, *, alpha: float, true_rank: int, use_rslora: bool = False) -> RankNumbers:
        """Nothing padded, nothing sharded.

        Raises:
            AdapterIncompatible: a rank outside 1..512, or an alpha that is not finite.
        """
        if not 1 <= true_rank <= MAX_RANK:
            raise AdapterIncompatible(f"adapter rank {true_rank} is outside 1..{MAX_RANK}")
        if not math.isfinite(alpha):
            raise AdapterIncompatible(f"adapter alpha {alpha} is not a finite number")
        scale = alpha / math.sqrt(true_rank) if use_rslora else alpha / true_rank
        return cls(alpha=alpha, true_rank=true_rank, padded_rank=true_rank, shard_rank=true_rank, scale=scale)

    def laid_out(self, *, padded_rank: int, shard_rank: int) -> RankNumbers:
        """The same adapter in a backend's layout; alpha, true rank and scale stay as they are.

        Raises:
            AdapterIncompatible: a padded rank below the true rank, or a shard above the padded rank.
        """
        if padded_rank < self.true_rank or not 1 <= shard_rank <= padded_rank:
            raise AdapterIncompatible(
                f"rank {self.true_rank} cannot be laid out with padded rank {padded_rank} and shard rank {shard_rank}"
            )
        return replace(self, padded_rank=padded_rank, shard_rank=shard_rank)
