"""An `aclTensor` as a rule sees it, and the questions that documents ask of one."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
import torch

from .refusal import invalid, null

ND = 2  # ACL_FORMAT_ND
NCHW = 0  # ACL_FORMAT_NCHW: torch_npu's name for a plain 4-D tensor
NCL = 47  # ACL_FORMAT_NCL: the same for 3-D
NCDHW = 30  # ACL_FORMAT_NCDHW: the same for 5-D
FRACTAL_NZ = 29  # ACL_FORMAT_FRACTAL_NZ

PLAIN = frozenset({ND, NCHW, NCL, NCDHW})

_NAMES = {
    torch.float32: "DT_FLOAT",
    torch.float16: "DT_FLOAT16",
    torch.bfloat16: "DT_BFLOAT16",
    torch.float64: "DT_DOUBLE",
    torch.int8: "DT_INT8",
    torch.int16: "DT_INT16",
    torch.int32: "DT_INT32",
    torch.int64: "DT_INT64",
    torch.uint8: "DT_UINT8",
    torch.bool: "DT_BOOL",
    torch.complex64: "DT_COMPLEX64",
    torch.complex128: "DT_COMPLEX128",
}

HALF = (torch.float16, torch.bfloat16)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INDICES = (torch.int32, torch.int64)
NUMBERS = (*FLOATS, torch.float64, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
ALL = (*NUMBERS, torch.bool)


class Tensor(Protocol):
    """What CANN is told of a tensor (aclCreateTensor: view shape, strides, offset, type, format, storage shape)."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def stride(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def format(self) -> int: ...

    def view(self) -> torch.Tensor:
        """A CPU tensor over the same memory, with this shape, stride and offset: writing it writes the device."""
        ...


def type_name(dtype: torch.dtype) -> str:
    """The name that CANN's messages give a data type."""
    return _NAMES.get(dtype, str(dtype))


@functools.lru_cache(maxsize=4096)
def _row_by_row(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


@functools.lru_cache(maxsize=4096)
def _swapped(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    rows, columns = shape[-2:]
    if (rows != 1 and strides[-2] != 1) or (columns != 1 and strides[-1] != rows):
        return False
    expected = rows * columns
    for size, stride in zip(reversed(shape[:-2]), reversed(strides[:-2]), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def is_contiguous(x: Tensor) -> bool:
    """Whether `x` is laid out row by row without gaps (a stride along an axis of one does not matter)."""
    return _row_by_row(x.shape, x.stride)


def is_transposed(x: Tensor) -> bool:
    """Whether `x` is a contiguous tensor with its last two axes swapped, and nothing else."""
    return len(x.shape) >= 2 and not is_contiguous(x) and _swapped(x.shape, x.stride)


def count(shape: Iterable[int]) -> int:
    """Elements of a tensor of this shape."""
    total = 1
    for size in shape:
        total *= size
    return total


def require(**tensors: Tensor | None) -> None:
    """Refuse a null pointer where a tensor is required (161001)."""
    for name, tensor in tensors.items():
        if tensor is None:
            raise null(name)


def require_dtype(name: str, x: Tensor | None, allowed: Sequence[torch.dtype]) -> None:
    """Refuse a data type outside the document's list (161002). A missing optional tensor passes."""
    if x is not None and x.dtype not in allowed:
        listed = ",".join(type_name(dtype) for dtype in allowed)
        raise invalid(
            f"Tensor {name} not implemented for {type_name(x.dtype)}, should be in dtype support list [{listed}]."
        )


def require_same_dtype(**tensors: Tensor | None) -> None:
    """Refuse tensors of differing data types (161002). Missing optional tensors pass."""
    present = [(name, tensor) for name, tensor in tensors.items() if tensor is not None]
    for name, tensor in present[1:]:
        if tensor.dtype != present[0][1].dtype:
            raise invalid(
                f"Expected {name} and {present[0][0]} to have the same dtype, but got "
                f"{type_name(tensor.dtype)} and {type_name(present[0][1].dtype)}."
            )


def require_shape(name: str, x: Tensor | None, shape: Sequence[int]) -> None:
    """Refuse any other shape than `shape` (161002). A missing optional tensor passes."""
    if x is not None and x.shape != tuple(shape):
        raise invalid(f"Expected tensor for {name} to have size {list(shape)}, but got {list(x.shape)}.")


def require_rank(name: str, x: Tensor | None, low: int, high: int) -> None:
    """Refuse a number of axes outside low..high (161002). A missing optional tensor passes."""
    if x is not None and not low <= len(x.shape) <= high:
        expected = str(low) if low == high else f"{low} to {high}"
        raise invalid(f"Expected {name} to have {expected} dimensions, but got {len(x.shape)} (shape {list(x.shape)}).")


def require_contiguous(**tensors: Tensor | None) -> None:
    """Refuse strided tensors where the document's column "non-contiguous" has a cross (161002)."""
    for name, tensor in tensors.items():
        if tensor is not None and not is_contiguous(tensor):
            raise invalid(
                f"Tensor {name} does not support non-contiguous input: shape {list(tensor.shape)}, "
                f"stride {list(tensor.stride)}."
            )


def require_plain(**tensors: Tensor | None) -> None:
    """Refuse a private layout (NZ and the like) where the document lists ND only (161002)."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.format not in PLAIN:
            raise invalid(f"Tensor {name} has format {tensor.format}, which is not in the format support list [ND].")


def broadcast(*shapes: Sequence[int]) -> tuple[int, ...]:
    """The common shape of operands that CANN broadcasts; refuse those that have none (161002)."""
    try:
        return tuple(np.broadcast_shapes(*(tuple(shape) for shape in shapes)))
    except ValueError as error:
        raise invalid(f"Shapes {[list(shape) for shape in shapes]} can not be broadcast.") from error


def wide(x: Tensor) -> torch.Tensor:
    """The values of `x` in at least float32, for one rounding at the end. Floats only."""
    values = x.view()
    return values if values.dtype == torch.float64 else values.to(torch.float32)


def store(out: Tensor, values: torch.Tensor) -> None:
    """Write `values` to `out`, rounded once to its type, to nearest even."""
    out.view().copy_(values)
