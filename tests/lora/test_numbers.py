from __future__ import annotations

import dataclasses

import pytest

from polyaccel.backend.errors import AdapterIncompatible
from polyaccel.lora.numbers import RankNumbers


def test_padding_and_sharding_never_change_alpha_true_rank_or_scale() -> None:
    trained = RankNumbers.of(alpha=16, true_rank=8)
    for padded, shard in ((32, 32), (32, 8), (8, 2), (16, 1)):
        laid = trained.laid_out(padded_rank=padded, shard_rank=shard)
        assert (laid.alpha, laid.true_rank, laid.scale) == (16, 8, 2.0)
        assert (laid.padded_rank, laid.shard_rank) == (padded, shard)


def test_the_numbers_are_immutable() -> None:
    numbers = RankNumbers.of(alpha=16, true_rank=8)
    with pytest.raises(dataclasses.FrozenInstanceError):
        numbers.true_rank = 32  # type: ignore[misc]


@pytest.mark.parametrize(("padded", "shard"), [(7, 7), (8, 9), (8, 0)])
def test_a_layout_that_loses_rank_is_refused(padded: int, shard: int) -> None:
    with pytest.raises(AdapterIncompatible, match="rank 8 cannot be laid out"):
        RankNumbers.of(alpha=16, true_rank=8).laid_out(padded_rank=padded, shard_rank=shard)


@pytest.mark.parametrize("rank", [0, -1, 513])
def test_a_rank_outside_the_range_is_refused(rank: int) -> None:
    with pytest.raises(AdapterIncompatible, match=str(rank)):
        RankNumbers.of(alpha=1.0, true_rank=rank)
