"""How a step's adapters are arranged for kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyaccel.backend import OperatorError, SlotRange, StepInput, TokenClass
from polyaccel.backend.step import AdapterRows

pytest.importorskip("triton", reason="run tox -e triton")

Triple = tuple[int, int, float]


class Store:
    """Slots one after the other, of these ranks; 0 for an empty one."""

    def __init__(self, ranks: Sequence[int]) -> None:
        starts = np.cumsum([0, *ranks]).tolist()
        self.rank_rows = starts[-1]
        self._ranges = [
            SlotRange(slot=i, first_rank_row=starts[i], rank_rows=rank) if rank else None
            for i, rank in enumerate(ranks)
        ]

    def ranges(self) -> Sequence[SlotRange | None]:
        return self._ranges


def step(tokens: int, triples: Sequence[Triple], token_class: TokenClass = TokenClass.DECODE) -> StepInput:
    rows, slots, weights = zip(*triples, strict=True) if triples else ((), (), ())
    given = AdapterRows.build(np.array(rows, np.int32), np.array(slots, np.int32), np.array(weights, np.float32))
    index = np.arange(tokens)
    return StepInput(
        token_class=token_class,
        token_ids=index,
        positions=index,
        query_starts=np.arange(tokens + 1, dtype=np.int32),
        context_lengths=np.ones(tokens, np.int32),
        block_tables=np.zeros((tokens, 1), np.int32),
        kv_slots=index,
        request_slots=index.astype(np.int32),
        logits_rows=index.astype(np.int32),
        sample_slots=index.astype(np.int32),
        uniforms=np.zeros(tokens, np.float32),
        adapters={"tokens": given} if triples else {},
    )


ROWS = st.integers(1, 40)
RANKS = st.lists(st.sampled_from([0, 1, 3, 8, 33]), min_size=1, max_size=6)
CLASSES = st.sampled_from(list(TokenClass))


@st.composite
def steps(draw: Any) -> tuple[StepInput, Store, list[Triple]]:
    tokens, ranks, token_class = draw(ROWS), draw(RANKS), draw(CLASSES)
    triple = st.tuples(
        st.integers(0, tokens - 1), st.integers(0, len(ranks) - 1), st.sampled_from([1.0, 0.5, -2.0, 0.25])
    )
    triples = draw(st.lists(triple, max_size=60))
    return step(tokens, triples, token_class), Store(ranks), triples


@given(steps())
def test_units_hold_every_row_once_with_all_its_adapters(drawn: tuple[StepInput, Store, list[Triple]]) -> None:
    from polyaccel_cuda.units import UNIT_ROWS, RankRows, units_of

    inputs, store, triples = drawn
    size, where = UNIT_ROWS[inputs.token_class], RankRows(inputs, store)  # type: ignore[arg-type]
    tables = units_of(inputs, "tokens", where)
    members, more, total = tables["members"], tables["more"], int(tables["seats"][0])
    assert members.shape[1] == size
    assert sorted(members[members >= 0].tolist()) == list(range(inputs.tokens))
    assert (members[total:] == -1).all()
    assert (members.reshape(-1)[tables["seats"][1:]] == members[members >= 0]).all()
    assert (members[:total, 0] >= 0).all()
    wanted: dict[tuple[int, int], float] = {}
    for row, slot, weight in triples:
        if store.ranges()[slot] is not None:
            wanted[row, slot] = wanted.get((row, slot), 0.0) + weight
    found: dict[tuple[int, int], float] = {}
    by_first = {where.first[slot]: slot for slot, held in enumerate(store.ranges()) if held is not None}
    for unit in range(total):
        for i in (unit, *range(more[unit], more[unit + 1])):
            if not tables["rank"][i]:
                continue
            slot = by_first[tables["first"][i]]
            assert tables["rank"][i] == where.rank[slot]
            assert tables["place"][i] == where.place[slot]
            for row, weight in zip(members[unit], tables["mix"][i], strict=True):
                if row >= 0:
                    found[int(row), slot] = found.get((int(row), slot), 0.0) + float(weight)
    assert {key: weight for key, weight in found.items() if weight} == {k: w for k, w in wanted.items() if w}


@given(steps())
def test_a_product_of_few_rows_takes_the_rank_rows_that_are_named_and_no_others(
    drawn: tuple[StepInput, Store, list[Triple]],
) -> None:
    from polyaccel_cuda.units import RankRows

    inputs, store, triples = drawn
    where = RankRows(inputs, store)  # type: ignore[arg-type]
    named = {slot for _, slot, _ in triples}
    rows = [where.first[slot] + r for slot in sorted(named) for r in range(where.rank[slot])]
    assert where.listed.tolist() == rows
    assert where.covered == len(rows)
    for slot in named:
        place = int(where.place[slot])
        assert where.listed[place : place + where.rank[slot]].tolist() == list(
            range(where.first[slot], where.first[slot] + where.rank[slot])
        )


def test_a_large_step_takes_all_rank_rows_up_to_the_last_one_named() -> None:
    from polyaccel_cuda.units import RankRows

    where = RankRows(step(65, [(0, 1, 1.0)]), Store([8, 16, 4]))  # type: ignore[arg-type]
    assert (where.covered, where.last, len(where.listed), where.place[1]) == (24, 24, 0, 8)


def test_adapters_without_a_store_are_refused() -> None:
    from polyaccel_cuda.units import RankRows

    with pytest.raises(OperatorError, match="has no adapter store"):
        RankRows(step(2, [(0, 1, 1.0)]), None)
