"""Steps of problems are such as the engine would send."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyaccel.backend import TokenClass
from polyaccel_conformance.problems.steps import (
    BLOCK_ORDERS,
    MIXES,
    SEGMENTS,
    Paging,
    adapter_rows,
    build_step,
    row_step,
)
from polyaccel_conformance.words import Source

LENGTHS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 60)), max_size=5)


@given(lengths=LENGTHS, size=st.sampled_from([1, 4, 16]), order=st.sampled_from(BLOCK_ORDERS), seed=st.integers(0, 99))
@settings(deadline=None)
def test_no_two_tokens_are_stored_in_one_slot(lengths: list[tuple[int, int]], size: int, order: str, seed: int) -> None:
    queries, contexts = [q for q, _ in lengths], [q + older for q, older in lengths]
    paging = Paging.of(Source(seed), queries, contexts, size, order)
    step = build_step(Source(seed), queries, contexts=contexts, paging=paging)
    assert len(set(step.kv_slots.tolist())) == step.tokens == sum(queries)
    everything = [set(paging.slots(i, 0, context).tolist()) for i, context in enumerate(contexts)]
    assert [len(slots) for slots in everything] == contexts
    written = set(step.kv_slots.tolist())
    for slots, query in zip(everything, queries, strict=True):
        # Nobody writes where another sequence reads.
        assert len(slots & written) == query
    assert all(0 <= slot < paging.blocks * size for slots in everything for slot in slots)


def test_sequences_of_a_common_prefix_share_its_full_blocks() -> None:
    paging = Paging.of(Source(1), [1, 2], [40, 37], 16, "shared")
    assert np.array_equal(paging.tables[0, :2], paging.tables[1, :2])
    assert paging.tables[0, 2] != paging.tables[1, 2]


@given(
    rows=st.integers(0, 20),
    pattern=st.sampled_from(SEGMENTS),
    mix=st.sampled_from(MIXES),
    slots=st.lists(st.integers(0, 9), unique=True, max_size=4),
    seed=st.integers(0, 99),
)
@settings(deadline=None)
def test_triples_are_ordered_by_slot_then_row(rows: int, pattern: str, mix: str, slots: list[int], seed: int) -> None:
    found = adapter_rows(Source(seed), rows, slots, pattern, mix, empty_slot=10)
    pairs = list(zip(found.slots.tolist(), found.rows.tolist(), strict=True))
    assert pairs == sorted(set(pairs))
    assert all(0 <= row < rows for row in found.rows)
    assert set(found.slots.tolist()) <= {*slots, 10}
    if mix == "power":
        assert np.all(np.abs(np.frexp(found.weights)[0]) == 0.5)


def test_patterns_are_what_they_are_called() -> None:
    def triples(pattern: str) -> list[tuple[int, int]]:
        found = adapter_rows(Source(3), 9, [1, 4, 6], pattern, empty_slot=2)
        return list(zip(found.rows.tolist(), found.slots.tolist(), strict=True))

    assert {row for row, _ in triples("one")} == set(range(9))
    assert triples("none") == []
    assert {0, 3, 6}.isdisjoint(row for row, _ in triples("gaps"))
    assert all(a != b for (_, a), (_, b) in zip(sorted(triples("each")), sorted(triples("each"))[1:], strict=False))
    assert triples("last") == [(8, 6)]
    assert len(triples("mixes")) > len({row for row, _ in triples("mixes")})
    assert {2, 1} <= {slot for _, slot in triples("cleared")}


@pytest.mark.parametrize("row_set", ["tokens", "logits"])
@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_a_step_of_rows_has_that_many_in_its_row_set(row_set: str, decode: bool, rows: int) -> None:
    step = row_step(Source(2), rows, row_set=row_set, decode=decode)  # type: ignore[arg-type]
    assert rows == (step.tokens if row_set == "tokens" else len(step.logits_rows))
    assert step.token_class is (TokenClass.DECODE if decode else TokenClass.MIXED)
    assert len(step.sample_slots) == len(step.uniforms) == len(step.logits_rows)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter than their queries"):
        build_step(Source(1), [3], contexts=[2])
    with pytest.raises(ValueError, match="one token and one row"):
        build_step(Source(1), [2], decode=True)
