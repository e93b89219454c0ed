from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyaccel.backend.errors import AdapterIncompatible
from polyaccel.lora.values import largest_magnitude

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@given(
    values=st.lists(st.floats(width=16), min_size=1, max_size=12),
    dtype=st.sampled_from(DTYPES),
)
def test_the_largest_magnitude_agrees_with_torch(values: list[float], dtype: torch.dtype) -> None:
    tensor = torch.tensor(values, dtype=torch.float32).to(dtype)
    expected = float(tensor.abs().float().max())
    assert largest_magnitude(tensor) == (expected if math.isfinite(expected) else math.inf)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_of_either_sign_give_zero_and_subnormals_do_not(dtype: torch.dtype) -> None:
    assert largest_magnitude(torch.tensor([0.0, -0.0], dtype=dtype)) == 0.0
    assert largest_magnitude(torch.tensor([0.0, -torch.finfo(dtype).smallest_normal / 2], dtype=dtype)) > 0.0
    assert largest_magnitude(torch.empty(0, 3, dtype=dtype)) == 0.0


def test_strided_views_are_read_in_place() -> None:
    tensor = torch.arange(12.0).view(3, 4)
    tensor[0, 1] = math.nan
    assert largest_magnitude(tensor[:, ::2]) == 10.0
    assert largest_magnitude(tensor[:, 1::2]) == math.inf


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(AdapterIncompatible, match="int32"):
        largest_magnitude(torch.ones(2, dtype=torch.int32))
