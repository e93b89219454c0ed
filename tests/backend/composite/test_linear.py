from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyaccel.backend.composite.linear import dequantize, dequantize_experts, linear
from polyaccel.backend.composite.weight import TensorWeight
from polyaccel.backend.errors import OperatorError
from polyaccel.backend.weight import Quantisation, Weight
from tests.backend.composite.cases import (
    CPU,
    FLOAT_DTYPES,
    Draw,
    assert_within,
    f64,
    filled_weight,
    spec_of,
    without_readback,
)


def reference(x: np.ndarray, matrix: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The product and the sum of its terms' absolute values."""
    y, magnitude = np.zeros((len(x), len(matrix))), np.zeros((len(x), len(matrix)))
    for t in range(len(x)):
        for i in range(len(matrix)):
            terms = x[t] * matrix[i]
            y[t, i] = terms.sum() + bias[i]
            magnitude[t, i] = np.abs(terms).sum() + abs(bias[i])
    return y, magnitude


@given(
    tokens=st.integers(0, 9),
    widths=st.lists(st.integers(0, 7), min_size=1, max_size=3),
    k=st.integers(0, 33),
    dtype=st.sampled_from(FLOAT_DTYPES),
    bias=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_linear_is_a_product_plus_bias(
    tokens: int, widths: list[int], k: int, dtype: torch.dtype, bias: bool, seed: int
) -> None:
    draw = Draw(seed)
    weight = filled_weight(spec_of("w", widths, k, dtype, bias=bias), draw)
    x = draw.tensor(tokens, k, dtype=dtype)
    y = without_readback(linear, x, weight)
    own_bias = f64(weight.bias) if weight.bias is not None else np.zeros(sum(widths))
    expected, magnitude = reference(f64(x), f64(weight.tensor), own_bias)
    assert y.dtype == dtype
    assert_within(y, expected, magnitude, depth=k)


@pytest.mark.parametrize("tokens", [1, 5])
def test_a_quantised_weight_multiplies_as_its_dequantised_form(tokens: int) -> None:
    draw = Draw(3)
    weight = TensorWeight(spec_of("w", [6], 12, torch.bfloat16, quantisation=Quantisation(group_size=4)), CPU)
    codes = torch.from_numpy(draw.generator.integers(0, 16, (6, 12)).astype(np.uint8))
    zeros = torch.full((6, 3), 7, dtype=torch.uint8)
    weight.write_quantised(0, codes, zeros, draw.tensor(6, 3).half())
    x = draw.tensor(tokens, 12, dtype=torch.bfloat16)
    expected, magnitude = reference(f64(x), f64(dequantize(weight)), np.zeros(6))
    assert_within(without_readback(linear, x, weight), expected, magnitude, depth=12)


def test_experts_are_dequantised_by_device_index() -> None:
    draw = Draw(4)
    float_weight = filled_weight(spec_of("w", [3], 4, experts=5), draw)
    quantised = TensorWeight(spec_of("w", [3], 4, experts=5, quantisation=Quantisation(group_size=4)), CPU)
    for expert in range(5):
        codes = torch.from_numpy(draw.generator.integers(0, 16, (3, 4)).astype(np.uint8))
        quantised.write_quantised(
            0, codes, torch.full((3, 1), 8, dtype=torch.uint8), torch.ones(3, 1).half(), expert=expert
        )
    for weight in (float_weight, quantised):
        chosen = without_readback(dequantize_experts, weight, torch.tensor([4, 0, 4]))
        assert torch.equal(chosen, dequantize(weight)[[4, 0, 4]])


def test_operands_outside_the_contract_are_refused() -> None:
    weight = filled_weight(spec_of("site.name", [3], 4), Draw(0))
    with pytest.raises(OperatorError, match=r"site\.name"):
        linear(torch.ones(2, 4, dtype=torch.bfloat16), weight)
    with pytest.raises(OperatorError, match="rows of 4"):
        linear(torch.ones(2, 5), weight)
    with pytest.raises(OperatorError, match="moe_experts"):
        linear(torch.ones(2, 4), filled_weight(spec_of("w", [3], 4, experts=2), Draw(0)))


class Foreign(Weight):
    """Another backend's weight."""

    def __init__(self) -> None:
        self.spec = spec_of("w", [3], 4)

    def write(self, slice_index: int, source: torch.Tensor, **where: object) -> None: ...  # type: ignore[override]

    def write_bias(self, slice_index: int, source: torch.Tensor, **where: object) -> None: ...  # type: ignore[override]

    def write_quantised(self, slice_index: int, *parts: torch.Tensor, **where: object) -> None: ...  # type: ignore[override]

    def seal(self) -> None: ...

    def reopen(self) -> None: ...

    @property
    def nbytes(self) -> int:
        return 0


def test_another_weight_class_is_refused_by_name() -> None:
    with pytest.raises(OperatorError, match="Foreign"):
        linear(torch.ones(1, 4), Foreign())
    with pytest.raises(OperatorError, match="Foreign"):
        dequantize(Foreign())
