"""How a rank's part of a model is cut and padded."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from polyaccel.models.shard import ALIGNMENT, shard_heads, shard_intermediate, shard_vocabulary

WORLDS = st.integers(1, 9)


@given(n=st.integers(1, 20_000), world=WORLDS, equal=st.booleans())
def test_the_ranks_parts_of_the_intermediate_dimension_join_to_the_whole(n: int, world: int, equal: bool) -> None:
    shards = [shard_intermediate(n, world, rank, equal=equal) for rank in range(world)]
    parts = [part for shard in shards for part in shard.rows]
    assert parts[0][0] == 0
    assert parts[-1][1] == n
    assert all(first[1] == second[0] for first, second in pairwise(parts))
    assert all(shard.size >= shard.rows.size for shard in shards)
    if equal:
        assert len({shard.size for shard in shards}) == 1
    else:
        assert all(shard.size == shard.rows.size for shard in shards)


@given(n=st.integers(1, 20_000), world=WORLDS)
def test_an_intermediate_part_is_as_even_as_the_alignment_allows(n: int, world: int) -> None:
    sizes = [shard_intermediate(n, world, rank, equal=False).size for rank in range(world)]
    if n % world == 0:
        assert len(set(sizes)) == 1
    elif n >= ALIGNMENT * world:
        assert all(size % ALIGNMENT == 0 for size in sizes[:-1])
        assert max(sizes) - min(sizes) < 2 * ALIGNMENT


@given(kv_heads=st.integers(1, 12), group=st.integers(1, 8), data=st.data())
def test_padded_heads_are_the_same_on_all_ranks_and_keep_query_heads_beside_their_key_head(
    kv_heads: int, group: int, data: st.DataObject
) -> None:
    world = data.draw(st.integers(1, kv_heads * group))
    shards = [shard_heads(kv_heads * group, kv_heads, world, rank, equal=True) for rank in range(world)]
    assert len({(shard.num_q, shard.num_kv) for shard in shards}) == 1
    for shard in shards:
        cut, per_kv = shard.cut, shard.num_q // shard.num_kv
        assert shard.num_q % shard.num_kv == 0
        for head in range(cut.num_q):
            # Attention pairs them by position among the padded heads, the model by number among all heads.
            assert cut.kv_heads[0] + head // per_kv == (cut.q_heads[0] + head) // group


@given(n=st.integers(1, 300_000), world=WORLDS)
def test_vocabulary_shards_have_one_size_and_lie_where_the_gathered_logits_expect_them(n: int, world: int) -> None:
    shards = [shard_vocabulary(n, world, rank) for rank in range(world)]
    assert len({shard.size for shard in shards}) == 1
    for rank, shard in enumerate(shards):
        assert all(start == rank * shard.size for start, _ in shard.rows)
    assert sum(shard.rows.size for shard in shards) == n
