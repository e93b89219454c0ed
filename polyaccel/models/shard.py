"""What one rank holds of a model: its heads, its part of the intermediate dimension and of the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from polyaccel.backend.plan import SiteRequest
from polyaccel.backend.support import Static
from polyaccel.backend.weight import Slice, WeightSpec
from polyaccel.models.config import ModelConfig
from polyaccel.parallel.cut import HeadCut, Rows, even_cut, head_cut, padded_head_cut, vocabulary_cut

# Widths that are no multiple of this make matrix products slow on most hardware.
ALIGNMENT = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadShard:
    """A rank's heads and the numbers of heads that its tensors have room for; those beyond its own are zero."""

    cut: HeadCut
    num_q: int
    num_kv: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DimensionShard:
    """A rank's part of a dimension and the size its tensors have; what is beyond its part is zero."""

    rows: Rows
    size: int


def shard_heads(num_heads: int, num_kv_heads: int, world_size: int, rank: int, *, equal: bool) -> HeadShard:
    """The heads of a rank, padded to the same numbers on all ranks when ``equal``.

    Raises:
        ConfigurationError: more ranks than query heads.
    """
    if equal:
        padded = padded_head_cut(num_heads, num_kv_heads, world_size, rank)
        return HeadShard(cut=padded.real, num_q=padded.padded_q, num_kv=padded.padded_kv)
    cut = head_cut(num_heads, num_kv_heads, world_size, rank)
    return HeadShard(cut=cut, num_q=cut.num_q, num_kv=cut.num_kv)


def shard_intermediate(n: int, world_size: int, rank: int, *, equal: bool) -> DimensionShard:
    """A rank's part of the intermediate dimension, in multiples of 16 where an even cut is impossible."""
    multiple = 1 if n % world_size == 0 or n < ALIGNMENT * world_size else ALIGNMENT
    rows = even_cut(n, world_size, rank, multiple=multiple)
    # The first rank holds the largest part.
    size = even_cut(n, world_size, 0, multiple=multiple).size if equal else rows.size
    return DimensionShard(rows=rows, size=size)


def shard_vocabulary(n: int, world_size: int, rank: int) -> DimensionShard:
    """A rank's part of the vocabulary; all ranks' tensors have one size, so that logits are gathered in one call."""
    rows, size = vocabulary_cut(n, world_size, rank)
    return DimensionShard(rows=rows, size=size)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShard:
    """What one rank's part of a model looks like; every block builds its weights, queries and targets from it.

    ``dtype`` is that of weights and activations, ``rank_rows`` the room for adapters a slice.
    """

    config: ModelConfig
    rank: int
    world_size: int
    dtype: torch.dtype
    rank_rows: int
    heads: HeadShard
    intermediate: DimensionShard
    vocabulary: DimensionShard

    @classmethod
    def of(
        cls, config: ModelConfig, *, rank: int, world_size: int, dtype: torch.dtype, rank_rows: int, equal: bool
    ) -> ModelShard:
        """The shard of a rank; with ``equal`` all ranks' tensors have the same shapes.

        Raises:
            ConfigurationError: more ranks than query heads.
        """
        return cls(
            config=config,
            rank=rank,
            world_size=world_size,
            dtype=dtype,
            rank_rows=rank_rows,
            heads=shard_heads(config.num_heads, config.num_kv_heads, world_size, rank, equal=equal),
            intermediate=shard_intermediate(config.intermediate_size, world_size, rank, equal=equal),
            vocabulary=shard_vocabulary(config.vocab_size, world_size, rank),
        )

    def spec(
        self,
        site: str,
        slices: tuple[Slice, ...],
        k: int,
        *,
        bias: bool = False,
        experts: int | None = None,
        lookup: bool = False,
        tied_to: str | None = None,
    ) -> WeightSpec:
        """A weight of this rank."""
        return WeightSpec(
            site=site,
            slices=slices,
            k=k,
            dtype=self.dtype,
            bias=bias,
            rank_rows=self.rank_rows,
            experts=experts,
            lookup=lookup,
            tied_to=tied_to,
        )

    def request(self, site: str, operator: str, **static: Static) -> SiteRequest:
        """A query about an operator, with what all queries say."""
        common: dict[str, Static] = {
            "dtype": str(self.dtype).removeprefix("torch."),
            "hidden": self.config.hidden_size,
            "world_size": self.world_size,
        }
        return SiteRequest(site=site, operator=operator, static=common | static)

    def linear_request(self, operator: str, spec: WeightSpec, **static: Static) -> SiteRequest:
        """A query about an operator on a weight. A bias is named on all ranks alike, also where one rank holds it."""
        of_weight: dict[str, Static] = {
            "k": spec.k,
            "slices": tuple(part.n for part in spec.slices),
            "bias": spec.bias,
            "quantised": spec.quantisation is not None,
            "group_size": 0 if spec.quantisation is None else spec.quantisation.group_size,
        }
        return self.request(spec.site, operator, **(of_weight | static))
