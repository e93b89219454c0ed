from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyaccel.backend.composite.linear import linear
from polyaccel.backend.composite.tiles import whole_tiles
from tests.backend.composite.cases import Draw, filled_weight, spec_of

HALVES = (torch.bfloat16, torch.float16)


@given(
    rows=st.sampled_from([17, 18, 31, 33, 64]),
    k=st.one_of(st.integers(1, 70), st.sampled_from([76, 100, 127, 260])),
    n=st.sampled_from([1, 2, 16, 33, 64]),
    dtype=st.sampled_from(HALVES),
    seed=st.integers(0, 2**16),
)
def test_a_nan_stays_in_its_row_whatever_the_width(rows: int, k: int, n: int, dtype: torch.dtype, seed: int) -> None:
    """oneDNN issue 5717; on processors without AMX this holds anyway."""
    draw = Draw(seed)
    weight = filled_weight(spec_of("w", [n], k, dtype), draw)
    x = draw.tensor(rows, k, dtype=dtype)
    x[rows // 2] = torch.nan
    assert linear(x, weight).isnan().any(1).nonzero().flatten().tolist() == [rows // 2]


@pytest.mark.parametrize(
    ("rows", "k", "dtype", "width"),
    [
        (17, 33, torch.bfloat16, 64),
        (17, 34, torch.float16, 64),
        (17, 31, torch.bfloat16, 32),
        (17, 65, torch.bfloat16, 96),
        (17, 32, torch.bfloat16, 32),
        (17, 64, torch.float16, 64),
        (17, 8, torch.bfloat16, 8),
        (17, 30, torch.bfloat16, 30),
        (16, 33, torch.bfloat16, 33),
        (17, 33, torch.float32, 33),
    ],
)
@pytest.mark.parametrize("axis", [-1, -2])
def test_only_operands_that_could_leak_are_copied(rows: int, k: int, dtype: torch.dtype, width: int, axis: int) -> None:
    a, b = Draw(0).tensor(rows, k, dtype=dtype), Draw(1).tensor(5, k, dtype=dtype)
    b = b if axis == -1 else b.t()
    filled_a, filled_b = whole_tiles(a, b, axis=axis)
    assert (filled_a is a, filled_b is b) == (width == k, width == k)
    assert filled_a.shape == (rows, width)
    assert filled_b.shape == ((5, width) if axis == -1 else (width, 5))
    assert torch.equal(filled_a[:, :k], a)
    assert torch.equal(filled_b[:, :k] if axis == -1 else filled_b[:k], b)
    assert not filled_a[:, k:].any()
    assert not (filled_b[:, k:] if axis == -1 else filled_b[k:]).any()


def test_other_devices_multiply_operands_as_they_are() -> None:
    a, b = (torch.empty(n, 33, dtype=torch.bfloat16, device="meta") for n in (17, 5))
    assert whole_tiles(a, b, axis=-1) == (a, b)
