from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyaccel.backend.composite.linear import dequantize
from polyaccel.backend.composite.weight import TensorWeight, pack_codes, unpack_codes
from polyaccel.backend.errors import ConfigurationError, OperatorError
from polyaccel.backend.weight import Quantisation
from tests.backend.composite.cases import CPU, Draw, spec_of


def test_pieces_land_in_their_slice_rows_and_columns() -> None:
    weight = TensorWeight(spec_of("w", [3, 2], 4, torch.bfloat16), CPU)
    source = torch.arange(1.0, 5.0).view(2, 2)
    weight.write(1, source, row=0, col=2)
    weight.write(0, torch.full((1, 4), 7.0), row=2)
    expected = torch.zeros(5, 4)
    expected[3:5, 2:4] = source
    expected[2] = 7.0
    assert torch.equal(weight.tensor.float(), expected)
    assert torch.equal(weight.part(1), weight.tensor[3:5])


def test_a_source_may_be_reused_after_the_write() -> None:
    weight = TensorWeight(spec_of("w", [2], 2), CPU)
    source = torch.ones(2, 2)
    weight.write(0, source)
    source.zero_()
    assert torch.equal(weight.tensor, torch.ones(2, 2))


def test_each_expert_and_bias_is_written_apart() -> None:
    weight = TensorWeight(spec_of("w", [2, 1], 2, experts=3, bias=True), CPU)
    weight.write(0, torch.ones(2, 2), expert=1)
    weight.write_bias(1, torch.full((1,), 5.0), expert=2)
    assert weight.bias is not None
    assert weight.tensor.sum(dim=(1, 2)).tolist() == [0.0, 4.0, 0.0]
    assert weight.bias.tolist() == [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 5.0]]


@pytest.mark.parametrize(
    ("slice_index", "shape", "row", "col", "expert"),
    [
        (2, (1, 1), 0, 0, None),
        (0, (4, 1), 0, 0, None),
        (0, (1, 5), 0, 0, None),
        (0, (1, 1), -1, 0, None),
        (0, (1, 1), 0, 0, 0),
    ],
)
def test_a_write_outside_the_weight_is_refused(
    slice_index: int, shape: tuple[int, int], row: int, col: int, expert: int | None
) -> None:
    weight = TensorWeight(spec_of("w", [3, 2], 4), CPU)
    with pytest.raises(OperatorError, match="w"):
        weight.write(slice_index, torch.ones(shape), row=row, col=col, expert=expert)
    assert not weight.tensor.any()


def test_a_bias_outside_its_slice_is_refused_even_if_other_slices_have_room() -> None:
    weight = TensorWeight(spec_of("w", [3, 2], 0, bias=True), CPU)
    with pytest.raises(OperatorError):
        weight.write_bias(0, torch.ones(4))
    with pytest.raises(OperatorError, match="dimensions"):
        weight.write_bias(0, torch.ones(1, 1))


def test_a_sealed_weight_refuses_writes_until_it_is_reopened() -> None:
    weight = TensorWeight(spec_of("w", [1], 1, bias=True), CPU)
    weight.seal()
    weight.seal()
    with pytest.raises(OperatorError, match="reopen"):
        weight.write(0, torch.ones(1, 1))
    with pytest.raises(OperatorError, match="reopen"):
        weight.write_bias(0, torch.ones(1))
    weight.reopen()
    weight.write(0, torch.ones(1, 1))
    assert weight.tensor.item() == 1.0


def test_a_bias_that_was_not_asked_for_is_refused() -> None:
    with pytest.raises(OperatorError, match="without a bias"):
        TensorWeight(spec_of("w", [1], 1), CPU).write_bias(0, torch.ones(1))


def test_a_tied_weight_shares_values_and_holds_no_bytes() -> None:
    first = TensorWeight(spec_of("embed", [5], 3), CPU)
    second = TensorWeight(spec_of("head", [5], 3, tied_to="embed", bias=True), CPU, first)
    first.write(0, torch.ones(5, 3))
    assert torch.equal(second.tensor, torch.ones(5, 3))
    assert first.nbytes == 60
    assert second.nbytes == 20
    with pytest.raises(OperatorError, match="embed"):
        second.write(0, torch.ones(5, 3))


def test_tying_weights_of_different_shape_is_refused() -> None:
    first = TensorWeight(spec_of("embed", [5], 3), CPU)
    with pytest.raises(OperatorError, match="embed"):
        TensorWeight(spec_of("head", [4], 3), CPU, first)
    with pytest.raises(OperatorError, match="embed"):
        TensorWeight(spec_of("head", [5], 3, torch.bfloat16), CPU, first)


@given(rows=st.integers(0, 5), k=st.integers(0, 9), bits=st.integers(1, 8), seed=st.integers(0, 2**32 - 1))
def test_packed_codes_come_back(rows: int, k: int, bits: int, seed: int) -> None:
    codes = torch.from_numpy(np.random.default_rng(seed).integers(0, 2**bits, (rows, k)).astype(np.uint8))
    packed = pack_codes(codes, bits)
    assert packed.shape == (rows, -(-k // 2) if bits == 4 else k)
    assert torch.equal(unpack_codes(packed, bits, k), codes)


def quantised_values(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, size: int) -> np.ndarray:
    values = np.zeros(codes.shape, dtype=np.float32)
    for i in range(codes.shape[0]):
        for j in range(codes.shape[1]):
            difference = int(codes[i, j]) - int(zeros[i, j // size])
            values[i, j] = np.float32(difference) * np.float32(scales[i, j // size])
    return values


@given(
    n=st.integers(1, 5),
    k=st.integers(1, 21),
    size=st.sampled_from([2, 4, 6, 32]),
    bits=st.sampled_from([3, 4, 8]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 2**32 - 1),
)
def test_dequantize_is_the_canonical_form_bit_for_bit(
    n: int, k: int, size: int, bits: int, dtype: torch.dtype, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    quantisation = Quantisation(bits=bits, group_size=size)
    weight = TensorWeight(spec_of("w", [n], k, dtype, quantisation=quantisation), CPU)
    groups = quantisation.groups(k)
    codes = generator.integers(0, 2**bits, (n, k)).astype(np.uint8)
    zeros = generator.integers(0, 2**bits, (n, groups)).astype(np.uint8)
    scales = generator.standard_normal((n, groups)).astype(np.float16)
    cut = (k // 2) // size * size  # written in two pieces of whole groups
    for a, b in ((0, cut), (cut, k)):
        span = slice(a // size, a // size + quantisation.groups(b - a))
        pieces = (codes[:, a:b], zeros[:, span], scales[:, span])
        weight.write_quantised(0, *(torch.from_numpy(p.copy()) for p in pieces), col=a)
    weight.seal()
    expected = torch.from_numpy(quantised_values(codes, zeros, scales, size)).to(dtype)
    assert torch.equal(dequantize(weight), expected)


def test_quantised_writes_that_cannot_be_canonical_are_refused() -> None:
    quantisation = Quantisation(bits=4, group_size=4)
    weight = TensorWeight(spec_of("w", [2], 10, quantisation=quantisation), CPU)

    def write(cols: int, groups: int, col: int, code: int = 0, scale: torch.dtype = torch.float16) -> None:
        codes = torch.full((2, cols), code, dtype=torch.uint8)
        weight.write_quantised(
            0, codes, torch.zeros(2, groups, dtype=torch.uint8), torch.ones(2, groups, dtype=scale), col=col
        )

    with pytest.raises(OperatorError, match="groups of 4"):
        write(4, 1, 2)
    with pytest.raises(OperatorError, match="groups of 4"):
        write(6, 2, 0)
    with pytest.raises(OperatorError, match="expected"):
        write(4, 2, 0)
    with pytest.raises(OperatorError, match="does not fit in 4 bits"):
        write(4, 1, 0, code=16)
    with pytest.raises(OperatorError, match="float16"):
        write(4, 1, 0, scale=torch.float32)
    with pytest.raises(OperatorError, match="write_quantised"):
        weight.write(0, torch.ones(2, 10))
    with pytest.raises(OperatorError, match="quantised"):
        _ = weight.tensor
    write(2, 1, 8)
    with pytest.raises(OperatorError, match="not quantised"):
        TensorWeight(spec_of("v", [2], 4), CPU).write_quantised(
            0, torch.zeros(2, 4, dtype=torch.uint8), torch.zeros(2, 1, dtype=torch.uint8), torch.ones(2, 1)
        )


def test_a_group_that_splits_a_byte_is_refused_at_allocation() -> None:
    with pytest.raises(ConfigurationError, match="even"):
        TensorWeight(spec_of("w", [2], 10, quantisation=Quantisation(bits=4, group_size=3)), CPU)
    with pytest.raises(ConfigurationError, match="bits"):
        TensorWeight(spec_of("w", [2], 10, quantisation=Quantisation(bits=9)), CPU)


def test_bytes_count_packing_scales_and_bias() -> None:
    quantisation = Quantisation(bits=4, group_size=4)
    weight = TensorWeight(spec_of("w", [2], 8, torch.float16, quantisation=quantisation, bias=True), CPU)
    assert weight.nbytes == 2 * 4 + 2 * 2 + 2 * 2 * 2 + 2 * 2


def test_a_random_weight_is_its_own_dequantised_form() -> None:
    weight = TensorWeight(spec_of("w", [3], 4), CPU)
    weight.write(0, Draw(0).tensor(3, 4))
    assert dequantize(weight).data_ptr() == weight.tensor.data_ptr()


def test_the_smallest_codes_and_groups_can_be_stored() -> None:
    draw = Draw(4)
    for quantisation in (Quantisation(bits=1, group_size=4), Quantisation(bits=8, group_size=1)):
        assert TensorWeight(spec_of("w", [2], 8, quantisation=quantisation), CPU).quantised is not None
    # One group of an odd number of columns splits no byte.
    quantisation = Quantisation(bits=4, group_size=5)
    weight = TensorWeight(spec_of("w", [2], 5, quantisation=quantisation), CPU)
    codes = torch.from_numpy(draw.generator.integers(0, 16, (2, 5)).astype(np.uint8))
    weight.write_quantised(0, codes, torch.zeros(2, 1, dtype=torch.uint8), torch.ones(2, 1, dtype=torch.float16))
    assert torch.equal(dequantize(weight), codes.float())
