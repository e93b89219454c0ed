from __future__ import annotations

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyaccel.weights.gguf_dequantize import GGUFType, dequantize, type_name

QUANTISED = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q6_K"]


@pytest.mark.parametrize("name", GGUFType.names())
def test_block_sizes_are_those_of_the_gguf_package(name: str) -> None:
    theirs = gguf.GGMLQuantizationType[name]
    ours = GGUFType.of_code(int(theirs))
    assert (ours.name, ours.block, ours.block_bytes) == (name, *gguf.GGML_QUANT_SIZES[theirs])
    assert ours.is_quantised == (name in QUANTISED)


@pytest.mark.parametrize("name", QUANTISED)
@given(rows=st.integers(1, 5), blocks=st.integers(1, 4), seed=st.integers(0, 2**31))
def test_any_bytes_unpack_bit_for_bit_as_in_the_gguf_package(name: str, rows: int, blocks: int, seed: int) -> None:
    theirs = gguf.GGMLQuantizationType[name]
    kind = GGUFType.of_code(int(theirs))
    raw = np.random.default_rng(seed).integers(0, 256, (rows, blocks * kind.block_bytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.dequantize(raw, theirs)
    result = dequantize(raw, kind)
    assert result.dtype == np.float32
    assert result.shape == (rows, blocks * kind.block)
    nans = np.isnan(expected)
    assert np.array_equal(nans, np.isnan(result))
    assert np.array_equal(result[~nans].view(np.uint32), expected[~nans].view(np.uint32))


@pytest.mark.parametrize("name", QUANTISED)
def test_more_blocks_than_one_piece_and_strided_rows_unpack_alike(name: str) -> None:
    theirs = gguf.GGMLQuantizationType[name]
    kind = GGUFType.of_code(int(theirs))
    values = np.random.default_rng(5).standard_normal((9, 1000 * kind.block), dtype=np.float32)
    if name == "Q6_K":
        raw = np.random.default_rng(5).integers(0, 60, (9, 1000 * kind.block_bytes), dtype=np.uint8)
    else:
        raw = gguf.quantize(values, theirs)
    whole = dequantize(raw, kind)
    assert np.array_equal(whole, gguf.dequantize(raw, theirs))
    part = dequantize(raw[2:5, 3 * kind.block_bytes : 7 * kind.block_bytes], kind)
    assert np.array_equal(part, whole[2:5, 3 * kind.block : 7 * kind.block])


def test_type_numbers_have_readable_names() -> None:
    assert type_name(12) == "Q4_K (type 12)"
    assert type_name(12345) == "unknown type 12345"
