from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyaccel.backend.composite import lora
from polyaccel.backend.errors import OperatorError
from polyaccel.backend.step import RowSet
from tests.backend.composite.cases import (
    FLOAT_DTYPES,
    Adapters,
    Draw,
    Module,
    Triple,
    assert_within,
    f64,
    filled_store,
    filled_weight,
    spec_of,
    step_input,
    step_of,
    without_readback,
)

EMPTY_SLOT = 5


def reference(
    y: torch.Tensor, x: torch.Tensor, adapters: Adapters, widths: list[int], triples: list[Triple]
) -> tuple[np.ndarray, np.ndarray]:
    """y plus all deltas, and a magnitude that bounds the terms behind each element."""
    expected, magnitude = f64(y).copy(), np.abs(f64(y))
    starts = np.cumsum([0, *widths])
    for row, slot, mix in triples:
        for i in range(len(widths)):
            for entry in adapters.packed[slot].entries if slot in adapters.packed else ():
                if entry.slice == i:
                    a, b = f64(adapters.packed[slot].a(entry)), f64(adapters.packed[slot].b(entry))
                    columns = slice(starts[i], starts[i + 1])
                    expected[row, columns] += mix * (b @ (a @ f64(x)[row]))
                    magnitude[row, columns] += abs(mix) * (np.abs(b) @ (np.abs(a) @ np.abs(f64(x)[row])))
    return expected, magnitude


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[int], dict[int, list[Module]], list[Triple], int]:
    """Widths of slices, modules by slot, triples and the number of rows. Slices may be narrower than a rank."""
    widths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    modules = {
        slot: [Module("w", i, draw(st.integers(1, 9))) for i in range(len(widths)) if draw(st.booleans())]
        for slot in draw(st.sets(st.integers(0, EMPTY_SLOT - 1), max_size=3))
    }
    rows = draw(st.integers(0, 7))
    slots = st.sampled_from([*modules, EMPTY_SLOT])
    mixes = st.sampled_from([1.0, 0.5, -2.0])
    triples = draw(st.lists(st.tuples(st.integers(0, rows - 1), slots, mixes), max_size=12)) if rows else []
    return widths, modules, triples, rows


@given(
    case=cases(),
    k=st.integers(1, 12),
    dtype=st.sampled_from(FLOAT_DTYPES),
    row_set=st.sampled_from(["tokens", "logits"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_sgmv_adds_every_triples_delta_to_its_own_columns(
    case: tuple[list[int], dict[int, list[Module]], list[Triple], int],
    k: int,
    dtype: torch.dtype,
    row_set: RowSet,
    seed: int,
) -> None:
    widths, modules, triples, rows = case
    draw = Draw(seed)
    weight = filled_weight(spec_of("w", widths, k, dtype, rank_rows=64), draw)
    adapters = filled_store({"w": weight}, modules, draw)
    step = step_of(step_input(adapters={row_set: triples}), adapters=adapters.store)
    x, y = draw.tensor(rows, k, dtype=dtype), draw.tensor(rows, sum(widths), dtype=dtype)
    expected, magnitude = reference(y, x, adapters, widths, triples)
    before_x, before_y = x.clone(), y.clone()

    shrunk = without_readback(lora.sgmv_shrink, x, weight, step, row_set)
    assert shrunk.shape[:2] == (len(triples), len(widths))
    parts = without_readback(lora.sgmv_expand, y.clone(), shrunk, weight, step, row_set)
    whole = without_readback(lora.sgmv, y, x, weight, step, row_set)

    assert whole is y
    assert_within(whole, expected, magnitude, depth=k + 9 + len(triples))
    assert_within(parts, expected, magnitude, depth=k + 9 + len(triples))
    assert torch.equal(x, before_x)
    touched = {row for row, slot, _ in triples if modules.get(slot)}
    for row in range(rows):
        assert row in touched or torch.equal(y[row], before_y[row])


def test_shrink_pads_to_the_largest_rank_of_the_site_with_zeros() -> None:
    draw = Draw(1)
    weight = filled_weight(spec_of("w", [2, 3], 4, rank_rows=16), draw)
    adapters = filled_store({"w": weight}, {0: [Module("w", 0, 5)], 1: [Module("w", 0, 2), Module("w", 1, 3)]}, draw)
    x = draw.tensor(3, 4)
    step = step_of(step_input(adapters={"tokens": [(2, 1, 0.5), (0, EMPTY_SLOT, 1.0)]}), adapters=adapters.store)
    h = lora.sgmv_shrink(x, weight, step)
    assert h.dtype == torch.float32
    assert h.shape == (2, 2, 5)
    expected = np.zeros((2, 2, 5))
    for entry in adapters.packed[1].entries:
        expected[0, entry.slice, : entry.rank] = f64(adapters.packed[1].a(entry)) @ f64(x)[2]
    assert_within(h, expected, 20.0, depth=4)


def test_a_row_in_many_mixes_is_rounded_once() -> None:
    draw = Draw(2)
    weight = filled_weight(spec_of("w", [3], 4, torch.bfloat16, rank_rows=16), draw)
    adapters = filled_store({"w": weight}, {slot: [Module("w", 0, 2)] for slot in range(4)}, draw)
    triples: list[Triple] = [(1, slot, 0.25 * (slot + 1)) for slot in range(4)]
    step = step_of(step_input(adapters={"tokens": triples}), adapters=adapters.store)
    x, y = draw.tensor(2, 4, dtype=torch.bfloat16), draw.tensor(2, 3, dtype=torch.bfloat16)
    expected, magnitude = reference(y, x, adapters, [3], triples)
    assert_within(lora.sgmv(y, x, weight, step), expected, magnitude, depth=20)


def test_a_row_named_twice_by_a_slot_gets_both_deltas() -> None:
    draw = Draw(6)
    weight = filled_weight(spec_of("w", [3], 4, rank_rows=16), draw)
    adapters = filled_store({"w": weight}, {0: [Module("w", 0, 2)]}, draw)
    triples: list[Triple] = [(0, 0, 1.0), (0, 0, 0.5), (2, 0, 1.0)]
    step = step_of(step_input(adapters={"tokens": triples}), adapters=adapters.store)
    x, y = draw.tensor(3, 4), draw.tensor(3, 3)
    expected, magnitude = reference(y, x, adapters, [3], triples)
    assert_within(lora.sgmv(y, x, weight, step), expected, magnitude, depth=9)


def test_a_nan_row_or_slot_stays_where_it_is_used() -> None:
    draw = Draw(3)
    weight = filled_weight(spec_of("w", [3], 4, rank_rows=16), draw)
    adapters = filled_store({"w": weight}, {0: [Module("w", 0, 2)], 1: [Module("w", 0, 2)]}, draw)
    matrices = adapters.store.read("w", 0, 1)
    assert matrices is not None
    matrices.b.fill_(torch.inf)
    x, y = draw.tensor(4, 4), torch.zeros(4, 3)
    x[2] = torch.nan
    step = step_of(step_input(adapters={"tokens": [(0, 0, 1.0), (2, 0, 1.0), (3, 1, 1.0)]}), adapters=adapters.store)
    lora.sgmv(y, x, weight, step)
    assert y[0].isfinite().all()
    assert not y[1].any()
    assert y[2].isnan().all()
    assert not y[3].isfinite().any()


def test_sgmv_writes_into_strided_outputs() -> None:
    draw = Draw(4)
    weight = filled_weight(spec_of("w", [3], 4, rank_rows=16), draw)
    adapters = filled_store({"w": weight}, {0: [Module("w", 0, 2)]}, draw)
    step = step_of(step_input(adapters={"tokens": [(0, 0, 1.0), (2, 0, 1.0)]}), adapters=adapters.store)
    x, wide = draw.tensor(3, 4), draw.tensor(3, 8)
    dense = wide[:, 2:5].clone()
    outside = wide[:, [0, 1, 5, 6, 7]].clone()
    lora.sgmv(wide[:, 2:5], x, weight, step)
    assert torch.equal(wide[:, 2:5], lora.sgmv(dense, x, weight, step))
    assert torch.equal(wide[:, [0, 1, 5, 6, 7]], outside)


def test_without_triples_nothing_is_touched_and_no_store_is_needed() -> None:
    weight = filled_weight(spec_of("w", [3], 4), Draw(0))
    y = Draw(1).tensor(2, 3)
    before = y.clone()
    step = step_of(step_input())
    assert torch.equal(lora.sgmv(y, Draw(2).tensor(2, 4), weight, step), before)
    assert lora.sgmv_shrink(Draw(2).tensor(2, 4), weight, step).shape == (0, 1, 0)
    assert torch.equal(lora.sgmv_expand(y, torch.zeros(0, 1, 0), weight, step), before)


def test_missing_stores_and_weights_with_experts_are_refused() -> None:
    step = step_of(step_input(adapters={"tokens": [(0, 0, 1.0)]}))
    x, y = torch.ones(1, 4), torch.ones(1, 3)
    with pytest.raises(OperatorError, match="no adapter store"):
        lora.sgmv(y, x, filled_weight(spec_of("w", [3], 4), Draw(0)), step)
    experts = filled_weight(spec_of("w", [3], 4, experts=2, rank_rows=2), Draw(0))
    adapters = filled_store({"w": experts}, {}, Draw(0))
    with pytest.raises(OperatorError, match="moe_experts"):
        lora.sgmv(y, x, experts, step_of(step.input, adapters=adapters.store))


def test_consecutive_rows_of_a_segment_are_a_slice() -> None:
    triples: list[Triple] = [(0, 0, 1.0), (2, 0, 1.0), (2, 1, 1.0), (3, 1, 1.0), (4, 1, 1.0), (7, 2, 1.0)]
    found = list(lora.segments(step_of(step_input(adapters={"tokens": triples})), "tokens"))
    assert [segment.run for segment in found] == [None, slice(2, 5), slice(7, 8)]


def test_slots_without_an_adapter_write_nothing_and_have_no_rank() -> None:
    draw = Draw(7)
    weight = filled_weight(spec_of("w", [3], 4, torch.bfloat16, rank_rows=16), draw)
    adapters = filled_store({"w": weight}, {}, draw)
    step = step_of(step_input(adapters={"tokens": [(0, EMPTY_SLOT, 1.0)]}), adapters=adapters.store)
    x, y = draw.tensor(1, 4, dtype=torch.bfloat16), draw.tensor(1, 3, dtype=torch.bfloat16)
    before = y._version
    lora.sgmv(y, x, weight, step)
    assert y._version == before
    assert lora.sgmv_shrink(x, weight, step).shape == (1, 1, 0)
