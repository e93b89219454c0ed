from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyaccel.backend.errors import ConfigurationError
from polyaccel.parallel.cut import Rows, even_cut, head_cut, padded_head_cut, vocabulary_cut


def members(rows: Rows) -> list[int]:
    return [i for start, stop in rows for i in range(start, stop)]


@given(n=st.integers(0, 300), world=st.integers(1, 9), multiple=st.integers(1, 40))
@settings(deadline=None)
def test_an_even_cut_partitions_in_order_and_differs_by_at_most_one_multiple(n: int, world: int, multiple: int) -> None:
    cuts = [even_cut(n, world, rank, multiple=multiple) for rank in range(world)]
    assert [i for cut in cuts for i in members(cut)] == list(range(n))
    units = [-(-cut.size // multiple) for cut in cuts]
    assert max(units) - min(units) <= 1
    ragged = [cut for cut in cuts if cut.size % multiple]
    assert len(ragged) == (1 if n % multiple else 0)
    assert all(cut.end == n for cut in ragged)


@given(n=st.integers(1, 500), world=st.integers(1, 12))
@settings(deadline=None)
def test_a_vocabulary_cut_gives_equal_padded_shards_that_cover_every_entry(n: int, world: int) -> None:
    cuts = [vocabulary_cut(n, world, rank) for rank in range(world)]
    assert [i for rows, _ in cuts for i in members(rows)] == list(range(n))
    assert {padded for _, padded in cuts} == {-(-n // world)}
    for rank, (rows, padded) in enumerate(cuts):
        assert rows.size <= padded
        assert not rows.ranges or rows.ranges[0][0] == rank * padded


@st.composite
def head_worlds(draw: st.DrawFn) -> tuple[int, int, int]:
    kv = draw(st.integers(1, 12))
    heads = kv * draw(st.integers(1, 12))
    return heads, kv, draw(st.integers(1, heads))


@given(head_worlds())
@settings(deadline=None, max_examples=300)
def test_query_heads_partition_and_each_sits_beside_its_own_kv_head(case: tuple[int, int, int]) -> None:
    heads, kv, world = case
    group = heads // kv
    cuts = [head_cut(heads, kv, world, rank) for rank in range(world)]
    assert [q for cut in cuts for q in range(*cut.q_heads)] == list(range(heads))
    holders = dict.fromkeys(range(kv), 0)
    for cut in cuts:
        assert cut.num_q >= 1
        assert cut.num_q == cut.num_kv * cut.heads_per_kv
        for local in range(cut.num_q):
            assert cut.kv_heads[0] + local // cut.heads_per_kv == (cut.q_heads[0] + local) // group
        for head in range(*cut.kv_heads):
            holders[head] += 1
    assert all(count >= 1 for count in holders.values())
    for cut in cuts:
        assert {holders[head] for head in range(*cut.kv_heads)} == {cut.kv_copies}
    if world <= kv:
        assert all(cut.kv_copies == 1 and cut.num_q % group == 0 for cut in cuts)
        sizes = [cut.num_kv for cut in cuts]
        assert max(sizes) - min(sizes) <= 1


@given(head_worlds())
@settings(deadline=None)
def test_a_padded_cut_has_equal_shapes_and_a_uniform_ratio(case: tuple[int, int, int]) -> None:
    heads, kv, world = case
    cuts = [padded_head_cut(heads, kv, world, rank) for rank in range(world)]
    assert len({(cut.padded_q, cut.padded_kv) for cut in cuts}) == 1
    assert all(cut.zero_q >= 0 and cut.zero_kv >= 0 for cut in cuts)
    assert all(cut.padded_q % cut.padded_kv == 0 for cut in cuts)
    assert any(cut.zero_q == 0 for cut in cuts)
    ratio = cuts[0].padded_q // cuts[0].padded_kv
    for cut in cuts:
        for local in range(cut.real.num_q):
            assert local // ratio == local // cut.real.heads_per_kv


def test_smollm2_heads_are_cut_as_the_architecture_page_says() -> None:
    sizes = {
        world: [(cut.num_q, cut.num_kv) for cut in (head_cut(9, 3, world, rank) for rank in range(world))]
        for world in (1, 2, 3, 4)
    }
    assert sizes == {
        1: [(9, 3)],
        2: [(6, 2), (3, 1)],
        3: [(3, 1), (3, 1), (3, 1)],
        4: [(3, 1), (3, 1), (2, 1), (1, 1)],
    }
    assert [head_cut(9, 3, 4, rank).kv_copies for rank in range(4)] == [1, 1, 2, 2]


def test_rows_of_the_projections_follow_the_heads() -> None:
    cut = head_cut(9, 3, 4, 3)
    assert cut.q_rows(64).ranges == ((8 * 64, 9 * 64),)
    assert cut.kv_rows(64).ranges == ((2 * 64, 3 * 64),)


def test_more_ranks_than_query_heads_are_refused_with_both_numbers() -> None:
    with pytest.raises(ConfigurationError, match=r"tensor_parallel_size=10 exceeds the model's 9 query heads"):
        head_cut(9, 3, 10, 0)


@pytest.mark.parametrize(("heads", "kv"), [(9, 2), (0, 1), (4, 0), (2, 4)])
def test_heads_that_do_not_divide_are_refused(heads: int, kv: int) -> None:
    with pytest.raises(ConfigurationError, match="do not divide"):
        head_cut(heads, kv, 1, 0)


@pytest.mark.parametrize(("world", "rank"), [(0, 0), (2, 2), (2, -1)])
def test_a_rank_outside_the_world_is_refused(world: int, rank: int) -> None:
    for cut in (lambda: even_cut(8, world, rank), lambda: vocabulary_cut(8, world, rank)):
        with pytest.raises(ConfigurationError, match="rank"):
            cut()
    for heads in (head_cut, padded_head_cut):
        with pytest.raises(ConfigurationError, match=r"rank|world"):
            heads(4, 2, world, rank)


@pytest.mark.parametrize("ranges", [((2, 2),), ((3, 1),), ((0, 2), (1, 3)), ((4, 5), (0, 1)), ((-1, 2),)])
def test_rows_that_are_not_ordered_and_disjoint_are_refused(ranges: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(ConfigurationError, match="ordered"):
        Rows(ranges)


def test_taking_rows_is_a_view_for_one_range_and_a_copy_for_several() -> None:
    whole = torch.arange(24).view(6, 4)
    one = Rows(((1, 3),)).take(whole, 0)
    assert one.data_ptr() == whole[1:].data_ptr()
    assert torch.equal(one, whole[1:3])
    assert torch.equal(Rows(((0, 1), (2, 4))).take(whole, 1), whole[:, [0, 2, 3]])
    assert Rows().take(whole, 0).shape == (0, 4)
    with pytest.raises(ConfigurationError, match=r"up to 7"):
        Rows(((0, 7),)).take(whole, 0)
