"""What an aclnn function receives, decoded: exactly what torch_npu handed over, and the same bytes as torch tensors."""

from __future__ import annotations

import ctypes
import functools
import math
import struct
from dataclasses import dataclass
from operator import mul
from typing import Any

import torch

ND, NZ = 2, 29
"""Storage formats (acl_base.h): plain, and the fractal layout of the cube unit."""

_TENSOR, _TENSORS, _INTS, _BOOLS, _FLOATS, _SCALAR, _SCALARS = range(0x7E501, 0x7E508)
DTYPES: dict[int, torch.dtype] = {
    0: torch.float32,
    1: torch.float16,
    2: torch.int8,
    3: torch.int32,
    4: torch.uint8,
    6: torch.int16,
    7: torch.uint16,
    8: torch.uint32,
    9: torch.int64,
    10: torch.uint64,
    11: torch.float64,
    12: torch.bool,
    16: torch.complex64,
    17: torch.complex128,
    27: torch.bfloat16,
}
"""torch's type for each ACL data type that has one; 4-bit types have none."""
INT4 = 29
_ITEM_SIZE = {code: dtype.itemsize for code, dtype in DTYPES.items()}
_HEAD = struct.Struct("8q")
ROOM = 24
"""Values that every descriptor has room for: sizes, strides and the storage's sizes of eight axes, or a short list."""
_SMALL = ctypes.c_char * (_HEAD.size + 8 * ROOM)
_CPU = torch.device("cpu")
_VALUE = {0: "f", 1: "e", 2: "b", 3: "i", 4: "B", 6: "h", 7: "H", 8: "I", 9: "q", 10: "Q", 11: "d", 12: "?"}


def bytes_at(
    address: int, dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...], offset: int = 0
) -> torch.Tensor:
    """A CPU tensor over memory that is not torch's; it is valid as long as that memory is.

    Args:
        address: of the storage's first element.
        stride, offset: in elements.
    """
    if 0 in shape:
        return torch.empty_strided(shape, stride, dtype=dtype)
    elements = offset + 1 + sum(map(mul, shape, stride)) - sum(stride)
    storage = torch._C._construct_storage_from_data_pointer(address, _CPU, elements * dtype.itemsize)
    return torch.empty(0, dtype=dtype).set_(storage, offset, shape, stride)


# A loop meets the same places again and again, and to make the tensor costs more than most operators do with it.
_view_at = functools.lru_cache(maxsize=4096)(bytes_at)


class AclTensor:
    """One ``aclTensor``.

    Attributes:
        shape, stride: in elements.
        offset: of the view in its storage, in elements.
        storage_shape: what the storage holds; differs from ``shape`` for views and for NZ.
        acl_dtype: ACL's number of the type; ``dtype`` is torch's, None where torch has none (4-bit types).
        format: storage format, ``ND`` or ``NZ`` among others.
        address: of the storage.
        device: number of the card whose memory this is; -1 pinned host memory; -2 memory the runtime does not know.
    """

    __slots__ = ("acl_dtype", "address", "device", "dtype", "format", "offset", "shape", "storage_shape", "stride")

    def __init__(
        self,
        address: int,
        acl_dtype: int,
        shape: tuple[int, ...],
        stride: tuple[int, ...],
        offset: int = 0,
        storage_shape: tuple[int, ...] = (),
        format: int = ND,
        device: int = 0,
    ) -> None:
        self.address = address
        self.acl_dtype = acl_dtype
        self.dtype = DTYPES.get(acl_dtype)
        self.shape = shape
        self.stride = stride
        self.offset = offset
        self.storage_shape = storage_shape
        self.format = format
        self.device = device

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def contiguous(self) -> bool:
        """Whether the elements lie one after another in the order of the axes; axes of size 1 have no say."""
        step = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != step:
                return False
            step *= size
        return True

    @property
    def transposed(self) -> bool:
        """Whether it is a contiguous tensor with its last two axes exchanged, and not contiguous itself."""
        if self.ndim < 2 or self.contiguous:
            return False
        order = [*range(self.ndim - 2), self.ndim - 1, self.ndim - 2]
        exchanged = AclTensor(
            0, self.acl_dtype, tuple(self.shape[i] for i in order), tuple(self.stride[i] for i in order)
        )
        return exchanged.contiguous

    def tensor(self) -> torch.Tensor:
        """A CPU tensor of the same bytes, shape, stride and offset: what is written to it is written to the device.

        Raises:
            TypeError: torch has no such type.
        """
        if self.dtype is None:
            raise TypeError(f"ACL data type {self.acl_dtype} has no torch type")
        return bytes_at(self.address, self.dtype, self.shape, self.stride, self.offset)

    def view(self) -> torch.Tensor:
        """The same, one object for each place and layout, and so not to be resized or pointed elsewhere."""
        if self.dtype is None:
            raise TypeError(f"ACL data type {self.acl_dtype} has no torch type")
        return _view_at(self.address, self.dtype, self.shape, self.stride, self.offset)

    @property
    def extent(self) -> int:
        """Bytes from the storage's start to the end of the view; 0 for an empty one. 4-bit types count half a byte."""
        if not self.numel:
            return 0
        elements = self.offset + 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))
        if self.acl_dtype == INT4:
            return (elements + 1) // 2
        return elements * _ITEM_SIZE.get(self.acl_dtype, 1)

    def __repr__(self) -> str:
        name = str(self.dtype).removeprefix("torch.") if self.dtype else f"acl{self.acl_dtype}"
        layout = "" if self.format == ND else f", format {self.format}"
        offset = f", offset {self.offset}" if self.offset else ""
        return f"{name}{list(self.shape)} stride {list(self.stride)}{offset}{layout} npu:{self.device}"


@dataclass(frozen=True, slots=True)
class AclScalar:
    """One ``aclScalar``: its type by ACL's number, and its value as Python's."""

    acl_dtype: int
    value: bool | int | float | complex

    @property
    def dtype(self) -> torch.dtype | None:
        return DTYPES.get(self.acl_dtype)


class Decoder:
    """Reads descriptors out of the libraries' memory."""

    def tensor(self, handle: int | None) -> AclTensor | None:
        """An ``aclTensor*``; None for a null pointer."""
        if not handle:
            return None
        raw = _SMALL.from_address(handle).raw
        mark, n, dtype, offset, layout, storage_n, address, device = _HEAD.unpack_from(raw)
        if mark != _TENSOR:
            raise TypeError(f"expected an aclTensor, found mark {mark:#x}: the rule's signature is not torch_npu's")
        count = 2 * n + storage_n
        if count > ROOM:
            raw = ctypes.string_at(handle, _HEAD.size + 8 * count)
        values = struct.unpack_from(f"{count}q", raw, _HEAD.size)
        return AclTensor(address, dtype, values[:n], values[n : 2 * n], offset, values[2 * n :], layout, device)

    def _words(self, handle: int, mark: int, letter: str = "q") -> tuple[Any, ...]:
        found, count = struct.unpack("2q", ctypes.string_at(handle, 16))
        if found != mark:
            raise TypeError(f"expected mark {mark:#x}, found {found:#x}: the rule's signature is not torch_npu's")
        return struct.unpack(f"{count}{letter}", ctypes.string_at(handle + 16, 8 * count))

    def tensors(self, handle: int | None) -> tuple[AclTensor, ...] | None:
        """An ``aclTensorList*``; None for a null pointer. Null members are left out of no list: they raise."""
        if not handle:
            return None
        out = []
        for member in self._words(handle, _TENSORS):
            one = self.tensor(member)
            if one is None:
                raise TypeError("a tensor list has a null member")
            out.append(one)
        return tuple(out)

    def ints(self, handle: int | None) -> tuple[int, ...] | None:
        return self._words(handle, _INTS) if handle else None

    def bools(self, handle: int | None) -> tuple[bool, ...] | None:
        return tuple(bool(v) for v in self._words(handle, _BOOLS)) if handle else None

    def floats(self, handle: int | None) -> tuple[float, ...] | None:
        return self._words(handle, _FLOATS, "d") if handle else None

    def scalar(self, handle: int | None) -> AclScalar | None:
        if not handle:
            return None
        dtype, low, high = self._words(handle, _SCALAR)
        raw = struct.pack("2q", low, high)
        if dtype == 27:
            value: Any = struct.unpack("f", b"\0\0" + raw[:2])[0]
        elif dtype in (16, 17):
            value = complex(*struct.unpack_from("2f" if dtype == 16 else "2d", raw))
        else:
            value = struct.unpack_from(_VALUE[dtype], raw)[0]
        return AclScalar(dtype, value)

    def number(self, handle: int | None) -> bool | int | float | complex | None:
        """An ``aclScalar*`` as its value alone."""
        found = self.scalar(handle)
        return None if found is None else found.value

    def dtype(self, code: int) -> torch.dtype | int:
        """An ``aclDataType``; the number itself where torch has no such type."""
        return DTYPES.get(code, code)

    def scalars(self, handle: int | None) -> list[AclScalar] | None:
        if not handle:
            return None
        found = [self.scalar(member) for member in self._words(handle, _SCALARS)]
        return [one for one in found if one is not None]
