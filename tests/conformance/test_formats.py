"""Rounding is to the nearest number of a format, ties to even, from float64 in one step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyaccel_conformance.formats import FORMATS, Floats, Format, bits_of

NARROW = ("float16", "bfloat16")


def _by_quanta(x: Floats, to: Format) -> Floats:
    """As a format is defined: a multiple of the quantum, infinity beyond the largest number."""
    quantum = to.quantum(x)
    with np.errstate(all="ignore"):
        rounded = np.where(np.isfinite(x), np.rint(x / quantum) * quantum, x)
        return np.where(np.abs(rounded) > to.max, np.copysign(np.inf, x), rounded)


def _same_bits(one: Floats, other: Floats) -> bool:
    return one.shape == other.shape and one.tobytes() == other.tobytes()


@pytest.mark.parametrize("name", NARROW)
@given(values=st.lists(st.floats(width=64), min_size=1, max_size=8))
@settings(deadline=None, max_examples=300)
def test_any_number_goes_to_the_nearest_multiple_of_its_quantum(name: str, values: list[float]) -> None:
    x = np.array(values)
    assert _same_bits(FORMATS[name].round(x), _by_quanta(x, FORMATS[name]))


@pytest.mark.parametrize("name", NARROW)
def test_every_number_stays_and_every_midpoint_and_its_neighbours_go_where_they_must(name: str) -> None:
    form = FORMATS[name]
    every = torch.arange(2**15, dtype=torch.int16).view(form.torch).to(torch.float64).numpy()
    every = np.sort(every[np.isfinite(every)])
    middle = (every[1:] + every[:-1]) / 2
    for x in (every, middle, np.nextafter(middle, np.inf), np.nextafter(middle, -np.inf), np.array([form.overflow])):
        for signed in (x, -x):
            assert _same_bits(form.round(signed), _by_quanta(signed, form))
    assert _same_bits(form.round(every), every)


@pytest.mark.parametrize("name", FORMATS)
def test_a_single_number_an_empty_array_and_a_view_with_gaps_keep_their_shapes(name: str) -> None:
    form = FORMATS[name]
    assert form.round(1.0).shape == ()
    assert form.round(np.zeros((0, 3))).shape == (0, 3)
    assert np.array_equal(form.round(np.arange(8.0)[::2]), np.arange(8.0)[::2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_bits_have_the_tensor_s_shape(dtype: torch.dtype) -> None:
    for shape in ((), (0, 4), (3, 5)):
        tensor = torch.ones(shape).to(dtype)
        assert bits_of(tensor).shape == shape
        assert bits_of(tensor.T if len(shape) == 2 else tensor).dtype.itemsize == tensor.element_size()
