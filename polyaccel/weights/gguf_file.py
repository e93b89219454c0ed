"""One GGUF file, validated before any tensor is touched.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian. The ``gguf``
package trusts a file's own counts and takes seconds over long token lists, so the header is parsed here.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from polyaccel.backend.errors import ModelLoadError, PolyaccelError
from polyaccel.weights.checkpoint import as_path, sample_bytes
from polyaccel.weights.gguf_dequantize import GGUFType, type_name
from polyaccel.weights.mapped_file import map_file

_MAX_STRING = 64 << 20
_MAX_NAME = 1024
_MAX_ELEMENTS = 1 << 24
_MAX_NESTING = 4
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS: Mapping[int, tuple[str, str]] = MappingProxyType(
    {
        0: ("<B", "u1"),
        1: ("<b", "i1"),
        2: ("<H", "<u2"),
        3: ("<h", "<i2"),
        4: ("<I", "<u4"),
        5: ("<i", "<i4"),
        6: ("<f", "<f4"),
        7: ("<B", "u1"),
        10: ("<Q", "<u8"),
        11: ("<q", "<i8"),
        12: ("<d", "<f8"),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GGUFTensor:
    """Where one tensor lies. ``shape`` is outermost first (the file stores it innermost first)."""

    name: str
    type: GGUFType
    shape: tuple[int, ...]
    start: int
    nbytes: int


class GGUFFile:
    """Metadata and raw tensors of one GGUF file, read through a private map.

    Attributes: ``path``; ``metadata``, key to int, float, bool, str, numpy array (arrays of numbers) or list (arrays of
    strings); ``tensors``, name to GGUFTensor in file order. Both maps are read-only. ``error`` is raised for every
    defect, naming the file, the key or tensor and the value.
    """

    def __init__(self, path: str | os.PathLike[str], error: type[PolyaccelError] = ModelLoadError) -> None:
        self.path = as_path(path)
        self._error = error
        self._data: npt.NDArray[np.uint8] | None = map_file(self.path, error)
        header = _Header(self._data, str(self.path), error)
        self.metadata: Mapping[str, object] = MappingProxyType(header.metadata)
        self.tensors: Mapping[str, GGUFTensor] = MappingProxyType(header.tensors)
        self._header_bytes = header.data_start

    def raw(self, tensor: GGUFTensor) -> npt.NDArray[np.uint8]:
        """The stored bytes [rows, bytes of a row], all dimensions but the innermost being rows. A view of the map."""
        data = self._open_data()
        rows = prod(tensor.shape[:-1])
        return data[tensor.start : tensor.start + tensor.nbytes].reshape(rows, tensor.nbytes // rows)

    def integer(self, key: str, default: int | None = None) -> int:
        """Integer metadata; ``default`` if the key is absent, and an error if that is None."""
        value = self._get(key, default)
        if type(value) is not int:
            raise self._wrong(key, value, "an integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A float or an integer, as float."""
        value = self._get(key, default)
        if type(value) not in (int, float):
            raise self._wrong(key, value, "a number")
        return float(value)  # type: ignore[arg-type]

    def text(self, key: str, default: str | None = None) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, value, "a string")
        return value

    def flag(self, key: str, default: bool | None = None) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "a boolean")
        return value

    def strings(self, key: str) -> list[str]:
        """An array of strings; an error if the key is absent."""
        value = self._get(key, None)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._wrong(key, value, "an array of strings")
        return value

    def numbers(self, key: str) -> npt.NDArray[np.generic]:
        """An array of numbers; an error if the key is absent."""
        value = self._get(key, None)
        if not isinstance(value, np.ndarray):
            raise self._wrong(key, value, "an array of numbers")
        return value

    def digest(self) -> bytes:
        """SHA-256 of the header and of a sample of each tensor (see ``Checkpoint.fingerprint``)."""
        data = self._open_data()
        digest = hashlib.sha256(data[: self._header_bytes].tobytes())
        for tensor in self.tensors.values():
            start, stop = sample_bytes(tensor.nbytes)
            digest.update(data[tensor.start + start : tensor.start + stop].tobytes())
        return digest.digest()

    def close(self) -> None:
        """Forbid further reads of tensors. Idempotent; the metadata stay readable."""
        self._data = None

    def _open_data(self) -> npt.NDArray[np.uint8]:
        if self._data is None:
            raise self._error(f"{self.path}: read after close()")
        return self._data

    def _get(self, key: str, default: object) -> object:
        value = self.metadata.get(key, default)
        if value is None:
            raise self._error(f"{self.path}: the metadata have no {key!r}")
        return value

    def _wrong(self, key: str, value: object, expected: str) -> PolyaccelError:
        return self._error(f"{self.path}: metadata {key!r} is {str(value)[:80]!r}, expected {expected}")


class _Header:
    """The parse of one header: a cursor over the file in which every step is checked against the file's end."""

    def __init__(self, data: npt.NDArray[np.uint8], what: str, error: type[PolyaccelError]) -> None:
        self._view = memoryview(data.data)
        self._size = data.size
        self._what = what
        self._error = error
        self._at = 0
        self.metadata: dict[str, object] = {}
        self.tensors: dict[str, GGUFTensor] = {}
        tensor_count, key_count = self._preamble()
        for _ in range(key_count):
            key = self._string("a metadata key", _MAX_NAME)
            if not key:
                self._fail("a metadata key is empty")
            if key in self.metadata:
                self._fail(f"the metadata key {key!r} occurs twice")
            self.metadata[key] = self._value(self._number("<I", f"the type of {key!r}"), key, 0)
        infos = [self._tensor_info() for _ in range(tensor_count)]
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1) or alignment > 1 << 20:
            self._fail(f"general.alignment is {str(alignment)[:40]}, expected a power of two up to 1048576")
        self.data_start = -(-self._at // alignment) * alignment
        self._place(infos, alignment)

    def _fail(self, message: str) -> NoReturn:
        raise self._error(f"{self._what}: {message}")

    def _preamble(self) -> tuple[int, int]:
        if self._size < 24 or bytes(self._view[:4]) != b"GGUF":
            self._fail("does not begin with 'GGUF'; it is not a GGUF file or is cut off")
        self._at = 4
        version = self._number("<I", "the version")
        if version not in (2, 3):
            hint = " (a big-endian file)" if version & 0xFFFF == 0 else ""
            self._fail(f"GGUF version {version}{hint} is not supported; versions 2 and 3, little-endian, are")
        tensor_count, key_count = self._number("<Q", "the tensor count"), self._number("<Q", "the metadata count")
        # NOTE: 28 and 13 are the fewest bytes that an entry of each kind can take.
        if tensor_count * 28 + key_count * 13 > self._size - self._at:
            self._fail(f"{tensor_count} tensors and {key_count} metadata keys do not fit in {self._size} bytes")
        return tensor_count, key_count

    def _take(self, count: int, subject: str) -> int:
        start = self._at
        if count > self._size - start:
            self._fail(f"{subject} takes {count} bytes at offset {start}, beyond the file's {self._size}")
        self._at = start + count
        return start

    def _number(self, code: str, subject: str) -> int:
        start = self._take(struct.calcsize(code), subject)
        return int(struct.unpack_from(code, self._view, start)[0])

    def _string(self, subject: str, limit: int = _MAX_STRING) -> str:
        length = self._number("<Q", f"the length of {subject}")
        if length > limit:
            self._fail(f"{subject} is said to have {length} bytes, more than {limit}")
        start = self._take(length, subject)
        try:
            return str(self._view[start : start + length], "utf-8")
        except UnicodeDecodeError:
            self._fail(f"{subject} at offset {start} is not valid UTF-8")

    def _value(self, code: int, key: str, depth: int) -> object:
        if code == _STRING:
            return self._string(f"the value of {key!r}")
        if code == _ARRAY:
            return self._array(key, depth)
        if code not in _SCALARS:
            self._fail(f"metadata {key!r} has unknown type {code}")
        layout = _SCALARS[code][0]
        start = self._take(struct.calcsize(layout), f"the value of {key!r}")
        (value,) = struct.unpack_from(layout, self._view, start)
        if code == _BOOL:
            if value > 1:
                self._fail(f"the boolean {key!r} has the byte {value}")
            return bool(value)
        return value

    def _array(self, key: str, depth: int) -> object:
        code = self._number("<I", f"the element type of {key!r}")
        count = self._number("<Q", f"the length of {key!r}")
        smallest = {_STRING: 8, _ARRAY: 12}.get(code) or (struct.calcsize(_SCALARS[code][0]) if code in _SCALARS else 0)
        if not smallest:
            self._fail(f"metadata {key!r} is an array of unknown type {code}")
        if count > _MAX_ELEMENTS or count * smallest > self._size - self._at:
            self._fail(f"metadata {key!r} is said to have {count} elements, which do not fit in the file or the limits")
        if code == _STRING:
            return self._strings(key, count)
        if code == _ARRAY:
            if depth >= _MAX_NESTING:
                self._fail(f"metadata {key!r} nests arrays deeper than {_MAX_NESTING}")
            return [self._array(key, depth + 1) for _ in range(count)]
        start = self._take(count * smallest, f"the value of {key!r}")
        return np.frombuffer(self._view[start : self._at], dtype=_SCALARS[code][1]).copy()

    def _strings(self, key: str, count: int) -> list[str]:
        # NOTE: vocabularies have 100,000 and more entries, so this loop does without the helpers above.
        view, at, size = self._view, self._at, self._size
        result: list[str] = []
        length_at = struct.Struct("<Q").unpack_from
        try:
            for _ in range(count):
                (length,) = length_at(view, at)
                at += 8 + length
                if at > size:
                    self._fail(f"string {len(result)} of {key!r} is said to have {length} bytes, beyond the file's end")
                result.append(str(view[at - length : at], "utf-8"))
        except struct.error:
            self._fail(f"string {len(result)} of {key!r} begins beyond the file's end")
        except UnicodeDecodeError:
            self._fail(f"string {len(result)} of {key!r} is not valid UTF-8")
        self._at = at
        return result

    def _tensor_info(self) -> tuple[str, tuple[int, ...], GGUFType, int]:
        name = self._string("a tensor's name", _MAX_NAME)
        subject = f"tensor {name!r}"
        count = self._number("<I", f"the number of dimensions of {subject}")
        if not 1 <= count <= 4:
            self._fail(f"{subject} has {count} dimensions, expected 1 to 4")
        start = self._take(8 * count, f"the shape of {subject}")
        shape = tuple(reversed(struct.unpack_from(f"<{count}Q", self._view, start)))
        code = self._number("<I", f"the type of {subject}")
        try:
            kind = GGUFType.of_code(code)
        except KeyError:
            known = ", ".join(GGUFType.names())
            self._fail(f"{subject} is stored as {type_name(code)}, which is not supported; supported are {known}")
        return name, shape, kind, self._number("<Q", f"the offset of {subject}")

    def _place(self, infos: list[tuple[str, tuple[int, ...], GGUFType, int]], alignment: int) -> None:
        room = self._size - self.data_start
        for name, shape, kind, offset in infos:
            if name in self.tensors:
                self._fail(f"tensor {name!r} occurs twice")
            if any(dim < 1 for dim in shape) or prod(shape) > 2**50:
                self._fail(f"tensor {name!r} has the impossible shape {list(shape)}")
            if shape[-1] % kind.block:
                self._fail(f"tensor {name!r}: rows of {shape[-1]} are not whole {kind.name} blocks of {kind.block}")
            nbytes = prod(shape) // kind.block * kind.block_bytes
            if offset % alignment:
                self._fail(f"tensor {name!r}: offset {offset} is not a multiple of the alignment {alignment}")
            if offset + nbytes > room:
                self._fail(f"tensor {name!r}: {nbytes} bytes at offset {offset} leave the {max(room, 0)} bytes of data")
            start = self.data_start + offset
            self.tensors[name] = GGUFTensor(name=name, type=kind, shape=shape, start=start, nbytes=nbytes)
        end, before = 0, ""
        for tensor in sorted(self.tensors.values(), key=lambda tensor: tensor.start):
            if tensor.start < end:
                self._fail(f"tensors {before!r} and {tensor.name!r} overlap")
            end, before = tensor.start + tensor.nbytes, tensor.name
