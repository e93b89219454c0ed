"""Guarded buffers see every change of a bit, inside and outside of the argument, in every layout."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyaccel_conformance.harness.allocation import GUARD_BYTES, Allocations
from polyaccel_conformance.harness.layouts import CONTIGUOUS, LAYOUTS, OFFSET, ROW_PADDED, STEPPED, TRANSPOSED
from polyaccel_conformance.harness.memory import Guarded, Poison, as_bits, poison_, poison_pattern

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
OTHERS = (torch.int64, torch.int32, torch.uint8, torch.bool)
INJECTIVE = (CONTIGUOUS, ROW_PADDED, OFFSET, TRANSPOSED, STEPPED)


def _guarded(values: torch.Tensor, layout: str, poison: Poison = Poison.NAN) -> Guarded:
    return Guarded(values, layout, poison, torch.clone)


@given(
    shape=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    layout=st.sampled_from(INJECTIVE),
    dtype=st.sampled_from((*FLOATS, *OTHERS)),
    poison=st.sampled_from(Poison),
)
@settings(deadline=None, max_examples=150)
def test_the_argument_holds_its_values_and_nothing_has_changed(
    shape: list[int], layout: str, dtype: torch.dtype, poison: Poison
) -> None:
    values = torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)
    guarded = _guarded(values, layout, poison)
    assert torch.equal(guarded.tensor, values)
    assert guarded.tensor.storage_offset() > 0
    assert guarded.differences() == (0, 0)


@given(place=st.integers(0, 10**6), layout=st.sampled_from(INJECTIVE), poison=st.sampled_from(Poison))
@settings(deadline=None, max_examples=150)
def test_a_changed_bit_is_told_to_be_inside_or_outside(place: int, layout: str, poison: Poison) -> None:
    guarded = _guarded(torch.randn(4, 5), layout, poison)
    flat = guarded.tensor.as_strided((guarded.tensor.untyped_storage().nbytes() // 4,), (1,), 0)
    before = as_bits(guarded.tensor).clone()
    as_bits(flat)[place % len(flat)] ^= 1
    inside = not torch.equal(as_bits(guarded.tensor), before)
    assert guarded.differences() == ((0, 1) if inside else (1, 0))


def test_expanded_rows_share_their_memory() -> None:
    guarded = _guarded(torch.ones(3, 4), "expanded")
    assert guarded.tensor.stride() == (0, 1)
    guarded.tensor[0, 0] = 2
    assert guarded.differences() == (0, 1)


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_poison_is_a_quiet_nan_that_no_arithmetic_makes(dtype: torch.dtype) -> None:
    poisoned = poison_(torch.empty(1, dtype=dtype), Poison.NAN)
    assert poisoned.isnan().all()
    computed = torch.tensor([torch.inf], dtype=dtype) - torch.inf
    assert computed.isnan().all()
    assert as_bits(computed).item() != poison_pattern(Poison.NAN, dtype)
    assert as_bits(torch.full((1,), torch.nan, dtype=dtype)).item() != poison_pattern(Poison.NAN, dtype)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64, torch.int64, torch.int32, torch.int16, torch.uint8])
def test_the_poisons_of_a_dtype_are_three(dtype: torch.dtype) -> None:
    assert len({poison_pattern(poison, dtype) for poison in Poison}) == 3


def test_every_named_layout_of_the_contract_can_be_placed() -> None:
    for names in LAYOUTS.values():
        for name in names:
            assert torch.equal(_guarded(torch.ones(3, 2), name).tensor, torch.ones(3, 2))


@pytest.mark.parametrize("shape", [(3, 5), (1,), (0, 4), ()])
def test_new_memory_is_poisoned_aligned_and_as_asked_for(shape: tuple[int, ...]) -> None:
    allocations = Allocations(Poison.LARGE)
    tensor = allocations.new("aten::empty", lambda: torch.empty(shape))
    assert tensor.shape == torch.Size(shape)
    assert tensor.is_contiguous()
    assert (tensor == torch.finfo(torch.float32).max / 2).all()
    assert tensor.data_ptr() % 64 == 0
    tensor.zero_()
    assert allocations.trespassed() == 0


@pytest.mark.parametrize("beyond", [-1, 15])
def test_writing_beside_new_memory_is_seen(beyond: int) -> None:
    allocations = Allocations(Poison.NAN)
    tensor = allocations.new("aten::empty", lambda: torch.empty(3, 5))
    tensor.as_strided((1,), (1,), tensor.storage_offset() + beyond).zero_()
    assert allocations.trespassed() == 1
    assert GUARD_BYTES % 64 == 0


def test_memory_without_strides_is_left_alone() -> None:
    sparse = torch.eye(3).to_sparse()
    assert Allocations(Poison.NAN).new("aten::empty_like", lambda: sparse) is sparse
