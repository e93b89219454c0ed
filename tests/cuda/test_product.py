"""Products with a bias whose rows are not where cuBLAS adds it before it rounds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="run tox -e triton")

from polyaccel_cuda.kernels.invariant import product
from polyaccel_cuda.product import rounds_before_bias


@settings(max_examples=8, deadline=None)
@given(
    rows=st.sampled_from([1, 64, 65, 130]),
    k=st.sampled_from([1, 7, 33]),
    n=st.sampled_from([1, 17, 40]),
    seed=st.integers(0, 2**31 - 1),
)
def test_a_product_by_our_own_kernels_is_rounded_once_with_its_bias(rows: int, k: int, n: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, matrix = (torch.randn(*shape, generator=generator).half() for shape in ((rows, k), (n, k)))
    # Near minus the product, so that a rounding before the sum would show.
    bias = (-(x[0].double() @ matrix.double().T) + 1e-3).half()
    exact = x.double() @ matrix.double().T + bias.double()
    magnitudes = x.double().abs() @ matrix.double().abs().T + bias.double().abs()
    bound = (k + 2) * 2.0**-24 * magnitudes + 2.0**-11 * exact.abs() + 2.0**-25
    assert bool(((product(x, matrix, bias).double() - exact).abs() <= bound).all())


def test_rows_that_begin_between_vectors_are_told_from_those_that_do_not() -> None:
    x, matrix = torch.zeros(65, 128, dtype=torch.bfloat16), torch.zeros(64, 128, dtype=torch.bfloat16)
    assert not rounds_before_bias(x, matrix)
    assert rounds_before_bias(x, matrix[:63])
    assert rounds_before_bias(x[:, 1:], matrix[:, :-1])
    assert rounds_before_bias(torch.zeros(65, 127, dtype=torch.bfloat16), torch.zeros(64, 127, dtype=torch.bfloat16))
    assert not rounds_before_bias(x.float(), matrix[:63].float())
