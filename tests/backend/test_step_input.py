"""The contract's step: triples ordered into segments, the column of the plan."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from polyaccel.backend import AdapterRows, TokenClass
from polyaccel.backend.step import DEVICE_ARRAYS, StepInput, plan_key

TRIPLES = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5), st.integers(1, 8)), max_size=30)


def _build(triples: list[tuple[int, int, int]]) -> AdapterRows:
    columns = np.array(triples, dtype=np.int32).reshape(-1, 3).T
    return AdapterRows.build(columns[0], columns[1], columns[2].astype(np.float32))


@given(TRIPLES)
def test_segments_are_maximal_runs_of_one_slot_in_ascending_order(triples: list[tuple[int, int, int]]) -> None:
    built = _build(triples)
    assert len(built) == len(triples)
    assert built.starts[0] == 0
    assert built.starts[-1] == len(triples)
    assert np.all(np.diff(built.segment_slots) > 0)
    for index, slot in enumerate(built.segment_slots):
        segment = slice(built.starts[index], built.starts[index + 1])
        assert segment.stop > segment.start
        assert np.all(built.slots[segment] == slot)


@given(TRIPLES)
def test_triples_keep_their_order_inside_a_slot(triples: list[tuple[int, int, int]]) -> None:
    built = _build(triples)
    for slot in range(6):
        expected = [(row, weight) for row, s, weight in triples if s == slot]
        kept = built.slots == slot
        assert list(zip(built.rows[kept].tolist(), built.weights[kept].tolist(), strict=True)) == expected


def _input(token_class: TokenClass, adapters: dict[str, AdapterRows]) -> StepInput:
    arrays = {name: np.zeros(3, dtype=np.int64) for name in DEVICE_ARRAYS}
    return StepInput(token_class=token_class, adapters=adapters, **arrays)  # type: ignore[arg-type]


def test_a_step_has_adapters_when_any_row_set_has_a_triple() -> None:
    some = _build([(0, 1, 1)])
    assert not _input(TokenClass.DECODE, {}).has_adapters
    assert not _input(TokenClass.DECODE, {"tokens": AdapterRows(), "logits": AdapterRows()}).has_adapters
    assert _input(TokenClass.DECODE, {"tokens": AdapterRows(), "logits": some}).has_adapters
    assert _input(TokenClass.MIXED, {"tokens": some}).rows("tokens") is some
    assert len(_input(TokenClass.MIXED, {"tokens": some}).rows("logits")) == 0


def test_sizes_are_those_of_the_arrays() -> None:
    inputs = _input(TokenClass.DECODE, {})
    assert (inputs.tokens, inputs.sequences) == (3, 3)
    assert all(hasattr(inputs, name) for name in DEVICE_ARRAYS)


def test_every_column_of_the_plan_has_its_own_key() -> None:
    keys = [plan_key(c, a) for c in (TokenClass.DECODE, TokenClass.MIXED) for a in (False, True)]
    assert keys == [0, 1, 2, 3]
