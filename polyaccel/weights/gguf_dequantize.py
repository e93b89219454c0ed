"""GGUF's storage types and their exact values in float32.

Block layouts: ggml-common.h of ggml. The 32-element types are unpacked here, because a few passes over a cache-sized
piece are some three times faster than the ``gguf`` package's general routines; results are bit-equal to them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Self

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

# Blocks unpacked at once: 8192 x 32 floats are 1 MiB of results, which stays in a core's cache between passes.
_PIECE = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class GGUFType:
    """How elements are stored: ``block`` elements take ``block_bytes`` bytes. ``code`` is the file's number for it."""

    name: str
    code: int
    block: int
    block_bytes: int

    @classmethod
    def of_code(cls, code: int) -> Self:
        """The type a file's number stands for. Raises KeyError for unsupported ones."""
        name, block, block_bytes = _TYPES[code]
        return cls(name=name, code=code, block=block, block_bytes=block_bytes)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The names of all supported types."""
        return tuple(name for name, _, _ in _TYPES.values())

    @property
    def is_quantised(self) -> bool:
        return self.block > 1


_TYPES: Mapping[int, tuple[str, int, int]] = MappingProxyType(
    {
        0: ("F32", 1, 4),
        1: ("F16", 1, 2),
        2: ("Q4_0", 32, 18),
        3: ("Q4_1", 32, 20),
        6: ("Q5_0", 32, 22),
        7: ("Q5_1", 32, 24),
        8: ("Q8_0", 32, 34),
        14: ("Q6_K", 256, 210),
        30: ("BF16", 1, 2),
    }
)


def type_name(code: int) -> str:
    """A readable name for any type number, supported or not."""
    from gguf.constants import GGMLQuantizationType

    try:
        return f"{GGMLQuantizationType(code).name} (type {code})"
    except ValueError:
        return f"unknown type {code}"


def dequantize(raw: Bytes, kind: GGUFType) -> Floats:
    """Unpack quantised rows: raw [rows, bytes of a row] uint8, any strides -> new float32 [rows, columns].

    ``kind`` is one of the quantised types; a row is a whole number of its blocks.
    """
    blocks = raw.reshape(-1, kind.block_bytes)
    unpack = _UNPACKERS.get(kind.name, _unpack_with_gguf(kind.code))
    out = np.empty((blocks.shape[0], kind.block), dtype=np.float32)
    # NOTE: a hostile scale may be infinite; the product is then NaN, which is the format's own value for it.
    with np.errstate(invalid="ignore", over="ignore"):
        for start in range(0, blocks.shape[0], _PIECE):
            unpack(blocks[start : start + _PIECE], out[start : start + _PIECE])
    return out.reshape(raw.shape[0], raw.shape[1] // kind.block_bytes * kind.block)


def _half(blocks: Bytes, at: int) -> Floats:
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _nibbles(packed: Bytes, out: npt.NDArray[np.generic]) -> None:
    np.bitwise_and(packed, 15, out=out[:, :16], casting="unsafe")
    np.right_shift(packed, 4, out=out[:, 16:], casting="unsafe")


def _five_bits(blocks: Bytes, high_at: int, out: Floats) -> None:
    values = np.unpackbits(blocks[:, high_at : high_at + 4], axis=1, bitorder="little")
    np.left_shift(values, 4, out=values)
    low = np.empty_like(values)
    _nibbles(blocks[:, high_at + 4 :], low)
    np.add(values, low, out=out, casting="unsafe")


def _unpack_q4_0(blocks: Bytes, out: Floats) -> None:
    _nibbles(blocks[:, 2:], out)
    out -= 8
    out *= _half(blocks, 0)


def _unpack_q4_1(blocks: Bytes, out: Floats) -> None:
    _nibbles(blocks[:, 4:], out)
    out *= _half(blocks, 0)
    out += _half(blocks, 2)


def _unpack_q5_0(blocks: Bytes, out: Floats) -> None:
    _five_bits(blocks, 2, out)
    out -= 16
    out *= _half(blocks, 0)


def _unpack_q5_1(blocks: Bytes, out: Floats) -> None:
    _five_bits(blocks, 4, out)
    out *= _half(blocks, 0)
    out += _half(blocks, 2)


def _unpack_q8_0(blocks: Bytes, out: Floats) -> None:
    np.multiply(blocks[:, 2:].view(np.int8), _half(blocks, 0), out=out)


def _unpack_with_gguf(code: int) -> Callable[[Bytes, Floats], None]:
    def unpack(blocks: Bytes, out: Floats) -> None:
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize as dequantize_blocks

        out[:] = dequantize_blocks(np.ascontiguousarray(blocks), GGMLQuantizationType(code))

    return unpack


_UNPACKERS: Mapping[str, Callable[[Bytes, Floats], None]] = MappingProxyType(
    {
        "Q4_0": _unpack_q4_0,
        "Q4_1": _unpack_q4_1,
        "Q5_0": _unpack_q5_0,
        "Q5_1": _unpack_q5_1,
        "Q8_0": _unpack_q8_0,
    }
)
