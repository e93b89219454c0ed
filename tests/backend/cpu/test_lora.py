from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from polyaccel.backend.adapter_store import SlotRange
from polyaccel.backend.cpu import lora_plan
from polyaccel.backend.errors import OperatorError
from polyaccel.backend.step import RowSet
from tests.backend.composite.cases import Draw, Module, Triple, assert_within, f64, pack, spec_of, step_input
from tests.backend.cpu.machine import DTYPES, Machine, deltas, intermediate

EMPTY_SLOT = 5


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[int], dict[int, list[Module]], list[Triple], int]:
    """Widths of slices, modules by slot, triples and rows: decode of many slots, long segments, mixes, empty slots.

    Slices may be narrower than a rank, of unequal widths, and untouched by some adapters.
    """
    widths = draw(st.sampled_from([[6], [1, 1], [4, 2, 2], [3, 5], [6, 6], [2, 7, 1]]))
    same_rank = draw(st.sampled_from([None, 1, 3]))
    modules = {
        slot: [
            Module("w", i, same_rank or draw(st.integers(1, 9)))
            for i in range(len(widths))
            if same_rank or draw(st.booleans())
        ]
        for slot in range(draw(st.integers(0, EMPTY_SLOT)))
    }
    rows = draw(st.integers(0, 9))
    slots = st.sampled_from([*modules, EMPTY_SLOT])
    kind = draw(st.sampled_from(["one each", "segments", "any"]))
    if kind == "one each":
        chosen = draw(st.lists(slots, min_size=rows, max_size=rows, unique=len(modules) >= rows))
        return widths, modules, [(row, slot, 1.0) for row, slot in enumerate(chosen)], rows
    if kind == "segments":
        length = draw(st.integers(1, 4))
        chosen = draw(st.lists(slots, max_size=rows // length, unique=True))
        triples = [(i * length + j, slot, 1.0) for i, slot in enumerate(sorted(chosen)) for j in range(length)]
        return widths, modules, triples, rows
    mixes = st.sampled_from([1.0, 0.5, -2.0])
    triples = draw(st.lists(st.tuples(st.integers(0, rows - 1), slots, mixes), max_size=12)) if rows else []
    return widths, modules, triples, rows


@given(
    case=cases(),
    k=st.integers(1, 12),
    dtype=st.sampled_from(DTYPES),
    row_set=st.sampled_from(["tokens", "logits"]),
    gap=st.integers(0, 1),
    copies=st.booleans(),
    station=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_triples_delta_is_added_to_its_own_columns(
    case: tuple[list[int], dict[int, list[Module]], list[Triple], int],
    k: int,
    dtype: torch.dtype,
    row_set: RowSet,
    gap: int,
    copies: bool,
    station: bool,
    seed: int,
) -> None:
    widths, modules, triples, rows = case
    draw, machine = Draw(seed), Machine()
    weight, values = machine.weight(spec_of("w", widths, k, dtype, rank_rows=64), draw)
    store, packed = machine.store({"w": weight}, modules, draw, gap=gap)
    x = draw.tensor(rows, k, dtype=dtype)
    step = machine.begin(step_input(tokens=rows, adapters={row_set: triples}), adapters=store)
    added, magnitude = deltas(f64(x), packed, "w", weight.spec.starts, triples)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora_plan, "BATCH_COST_BYTES", 1 << 40 if copies else 0)
        if station:
            y = machine.operator("column_linear")(x, weight, step, row_set)
            product = f64(x) @ values[:, :k].T
            base = np.abs(f64(x)) @ np.abs(values[:, :k].T)
            # The product is rounded before the adapters are added.
            rounded = intermediate(dtype, np.abs(product))
        else:
            y = draw.tensor(rows, sum(widths), dtype=dtype)
            product, base, rounded = f64(y), np.abs(f64(y)), 0.0
            assert machine.operator("sgmv")(y, x, weight, step, row_set) is y
    assert_within(y, product + added, base + rounded + intermediate(dtype, magnitude), depth=k + 40)


@given(
    ranks=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    gap=st.integers(0, 2),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32 - 1),
)
def test_what_was_written_to_a_slot_is_read_from_it(ranks: list[int], gap: int, dtype: torch.dtype, seed: int) -> None:
    draw, machine = Draw(seed), Machine()
    weight, _ = machine.weight(spec_of("w", [4, 2, 6], 5, dtype, rank_rows=200), draw)
    modules = {slot: [Module("w", 0, rank), Module("w", 2, max(1, rank // 2))] for slot, rank in enumerate(ranks)}
    store, packed = machine.store({"w": weight}, modules, draw, gap=gap, slots=7)
    for slot, rank in enumerate(ranks):
        for entry in packed[slot].entries:
            found = store.read("w", entry.slice, slot)
            assert found is not None
            assert torch.equal(found.a, packed[slot].a(entry))
            assert torch.equal(found.b, packed[slot].b(entry))
            assert store.true_rank("w", entry.slice, slot) == entry.rank
        assert store.read("w", 1, slot) is None
        assert store.true_rank("w", 0, slot) == rank


def test_a_slot_that_is_cleared_or_rewritten_changes_the_next_step() -> None:
    draw, machine = Draw(4), Machine()
    weight, _ = machine.weight(spec_of("w", [6], 5, rank_rows=8), draw)
    store, packed = machine.store({"w": weight}, {0: [Module("w", 0, 2)], 1: [Module("w", 0, 2)]}, draw, gap=0)
    x, triples = draw.tensor(2, 5), [(0, 0, 1.0), (1, 1, 1.0)]
    inputs = step_input(tokens=2, adapters={"tokens": triples})
    linear, plain = machine.operator("column_linear"), machine.operator("linear")(x, weight)

    def added() -> torch.Tensor:
        y: torch.Tensor = linear(x, weight, machine.begin(inputs, adapters=store), "tokens")
        return y - plain

    before = added()
    assert before.abs().amin(1).all()
    store.clear(0)
    cleared = added()
    assert not cleared[0].any()
    assert torch.allclose(cleared[1], before[1])
    store.write(SlotRange(slot=0, first_rank_row=0, rank_rows=2), packed[1])
    assert torch.allclose(
        added()[0], torch.from_numpy(deltas(f64(x), {0: packed[1]}, "w", [0, 6], triples)[0][0]).float()
    )


def test_rows_of_an_adapter_that_does_not_touch_a_site_cost_no_launch_there() -> None:
    draw, machine = Draw(5), Machine()
    weights = {site: machine.weight(spec_of(site, [4], 3, rank_rows=8), draw)[0] for site in ("a", "b")}
    store, _ = machine.store(weights, {0: [Module("a", 0, 2)]}, draw)
    step = machine.begin(step_input(tokens=1, adapters={"tokens": [(0, 0, 1.0)]}), adapters=store)
    for site in ("a", "b"):
        machine.operator("column_linear")(draw.tensor(1, 3), weights[site], step)
    assert machine.backend.ledger.counts() == {"cpu.sgmv": 1, "cpu.linear_add": 1, "cpu.linear": 1}


def test_eight_adapters_of_one_rank_are_one_batch_and_mixed_ranks_too() -> None:
    draw, machine = Draw(6), Machine()
    weight, _ = machine.weight(spec_of("w", [4, 2], 3, rank_rows=99), draw)
    for ranks in ([2] * 8, [1, 2, 3, 4, 5, 6, 7, 8]):
        modules = {slot: [Module("w", 0, rank), Module("w", 1, rank)] for slot, rank in enumerate(ranks)}
        store, _ = machine.store({"w": weight}, modules, draw, gap=0, slots=8)
        triples = [(slot, slot, 1.0) for slot in range(8)]
        step = machine.begin(step_input(tokens=8, adapters={"tokens": triples}), adapters=store)
        plan = step.adapter_plan("tokens")
        assert len(plan.batches("w")) == 1
        again = machine.begin(step_input(tokens=8, adapters={"tokens": triples}), adapters=store)
        assert again.adapter_plan("tokens") is plan


class Copies(TorchDispatchMode):
    """Notes the copies of whole tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ == "clone":
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


def test_single_rows_with_gaps_between_them_are_added_to_without_a_copy_of_them() -> None:
    draw, machine = Draw(9), Machine()
    weight, _ = machine.weight(spec_of("w", [4, 2], 3, torch.bfloat16, rank_rows=16), draw)
    modules = {slot: [Module("w", 0, 2), Module("w", 1, 3)] for slot in range(2)}
    store, _ = machine.store({"w": weight}, modules, draw)
    x, dense = draw.tensor(2, 3, dtype=torch.bfloat16), draw.tensor(2, 6, dtype=torch.bfloat16)
    y = torch.zeros(2, 9, dtype=torch.bfloat16)[:, :6]
    y.copy_(dense)
    step = machine.begin(step_input(tokens=2, adapters={"tokens": [(0, 0, 1.0), (1, 1, 1.0)]}), adapters=store)
    with Copies() as copies:
        machine.operator("sgmv")(y, x, weight, step, "tokens")
    assert (2, 6) not in copies.shapes
    assert torch.equal(y, machine.operator("sgmv")(dense, x, weight, step, "tokens"))


def test_an_adapter_of_another_shape_leaves_its_slot_empty() -> None:
    draw, machine = Draw(7), Machine()
    weight, _ = machine.weight(spec_of("w", [4], 3, rank_rows=8), draw)
    other, _ = machine.weight(spec_of("w", [4], 5, rank_rows=8), draw)
    store, _ = machine.store({"w": weight}, {0: [Module("w", 0, 2)]}, draw)
    wrong = pack({"w": other}, [Module("w", 0, 2)], draw)  # type: ignore[dict-item]
    where = store.ranges()[0]
    assert where is not None
    with pytest.raises(OperatorError, match="expected"):
        store.write(where, wrong)
    assert store.ranges()[0] is None
    assert store.read("w", 0, 0) is None


@pytest.mark.parametrize("y", [torch.zeros(2, 4, dtype=torch.float64), torch.zeros(2, 5)])
def test_an_output_of_another_dtype_or_width_is_refused(y: torch.Tensor) -> None:
    draw, machine = Draw(8), Machine()
    weight, _ = machine.weight(spec_of("w", [4], 3, rank_rows=8), draw)
    store, _ = machine.store({"w": weight}, {0: [Module("w", 0, 2)]}, draw)
    step = machine.begin(step_input(tokens=2, adapters={"tokens": [(0, 0, 1.0)]}), adapters=store)
    with pytest.raises(OperatorError, match="'w' gives rows of 4") as caught:
        machine.operator("sgmv")(y, draw.tensor(2, 3), weight, step)
    assert [operand.name for operand in caught.value.operands] == ["y", "x"]
