from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyaccel.backend.cpu.packed import packs
from polyaccel.backend.cpu.weight import PackedWeight
from polyaccel.backend.errors import OperatorError
from polyaccel.backend.weight import Weight
from tests.backend.composite.cases import Draw, assert_within, f64, spec_of
from tests.backend.cpu.machine import DTYPES, Machine


@given(
    widths=st.lists(st.integers(1, 70), min_size=1, max_size=3),
    k=st.integers(0, 70),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_sealed_weight_gives_back_every_bit(
    widths: list[int], k: int, dtype: torch.dtype, bias: bool, seed: int
) -> None:
    machine = Machine()
    weight, values = machine.weight(spec_of("w", widths, k, dtype, bias=bias), Draw(seed))
    for _ in range(2):
        assert np.array_equal(f64(machine.backend.dequantize(weight)), values[:, :k])
        weight.reopen()
        weight.seal()


def test_packing_leaves_no_second_copy() -> None:
    weight, _ = Machine().weight(spec_of("w", [256], 512), Draw(1))
    assert isinstance(weight, PackedWeight)
    assert (weight.packed is not None) == packs(torch.float32)
    assert 256 * 512 * 4 <= weight.nbytes < 1.1 * 256 * 512 * 4
    if weight.packed is not None:
        assert weight._tensor is None


def test_a_sealed_weight_refuses_writes_until_it_is_reopened() -> None:
    machine = Machine()
    weight, _ = machine.weight(spec_of("w", [8], 4), Draw(1))
    with pytest.raises(OperatorError, match="sealed"):
        weight.write(0, torch.ones(8, 4))
    weight.reopen()
    weight.write(0, torch.ones(1, 4), row=3)
    weight.seal()
    y = machine.operator("linear")(torch.ones(1, 4), weight)
    assert y[0, 3].item() == 4.0


def _tied(machine: Machine, *, lookup: bool) -> tuple[Weight, Weight]:
    table, _ = machine.weight(spec_of("embedding", [40], 16, lookup=lookup), Draw(1))
    device = machine.backend.devices()[0]
    head = machine.backend.allocate_weight(spec_of("head", [40], 16, tied_to="embedding"), device, table)
    head.seal()
    return table, head


@pytest.mark.parametrize("lookup", [True, False])
def test_a_tied_weight_follows_the_one_it_is_tied_to(lookup: bool) -> None:
    machine = Machine()
    table, head = _tied(machine, lookup=lookup)
    linear, x = machine.operator("linear"), Draw(2).tensor(3, 16)
    before = linear(x, head).clone()
    assert torch.equal(machine.backend.dequantize(head), machine.backend.dequantize(table))
    table.reopen()
    table.write(0, torch.zeros(1, 16), row=5)
    table.seal()
    after = linear(x, head)
    assert not after[:, 5].any()
    others = [i for i in range(40) if i != 5]
    assert torch.equal(after[:, others], before[:, others])
    head.reopen()
    with pytest.raises(OperatorError, match="shares"):
        head.write(0, torch.zeros(1, 16))


def test_only_a_table_that_is_looked_up_is_copied_for_its_tied_weight() -> None:
    machine = Machine()
    assert _tied(machine, lookup=False)[1].nbytes == 0
    table, head = _tied(machine, lookup=True)
    assert table.nbytes == 40 * 16 * 4
    assert (head.nbytes > 0) == packs(torch.float32)


def test_experts_and_quantised_weights_stay_as_the_composites_have_them() -> None:
    machine = Machine()
    spec = spec_of("experts", [4], 6, experts=2)
    weight = machine.backend.allocate_weight(spec, machine.backend.devices()[0])
    weight.write(0, torch.ones(4, 6), expert=1)
    weight.seal()
    assert isinstance(weight, PackedWeight)
    assert weight.packed is None
    assert weight.tensor[1].sum().item() == 24.0
    with pytest.raises(OperatorError, match="2 experts"):
        machine.operator("linear")(torch.ones(1, 6), weight)


@given(
    rows=st.integers(0, 20),
    widths=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    k=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    strided=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_linear_is_the_product_within_rounding(
    rows: int, widths: list[int], k: int, dtype: torch.dtype, bias: bool, strided: bool, seed: int
) -> None:
    machine, draw = Machine(), Draw(seed)
    weight, values = machine.weight(spec_of("w", widths, k, dtype, bias=bias), draw)
    wide = draw.tensor(rows, k + 3, dtype=dtype)
    x = wide[:, :k] if strided else wide[:, :k].contiguous()
    y = machine.operator("linear")(x, weight)
    ones = np.concatenate((f64(x), np.ones((rows, 1))), axis=1)
    assert y.dtype == dtype
    assert_within(y, ones @ values.T, np.abs(ones) @ np.abs(values.T), depth=k + 1)
    assert torch.equal(machine.operator("linear")(x, weight), y), "two runs differ"
    copies = machine.backend.ledger.copies()
    assert copies == ({"copy.linear.x": 2} if strided and rows > 1 else {})


def test_rows_of_another_width_or_dtype_are_refused_by_name() -> None:
    machine = Machine()
    weight, _ = machine.weight(spec_of("layers.0.o", [8], 4), Draw(1))
    for x in (torch.ones(2, 5), torch.ones(2, 4, dtype=torch.bfloat16), torch.ones(4)):
        with pytest.raises(OperatorError, match=r"layers\.0\.o"):
            machine.operator("linear")(x, weight)
