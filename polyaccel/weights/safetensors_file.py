"""One safetensors file, validated before any tensor is touched.

Format: 8 bytes little-endian header length, a JSON header, then the tensors' bytes without holes or overlaps
(https://github.com/huggingface/safetensors, section Format).
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import torch

from polyaccel.backend.errors import ModelLoadError, PolyaccelError
from polyaccel.weights.checkpoint import as_path, sample_bytes, slice_bounds
from polyaccel.weights.json_file import parse_json_object
from polyaccel.weights.mapped_file import map_file

_MAX_HEADER = 100_000_000
_MAX_DIMS = 64
_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "BOOL": torch.bool,
        "U8": torch.uint8,
        "I8": torch.int8,
        "F8_E5M2": torch.float8_e5m2,
        "F8_E4M3": torch.float8_e4m3fn,
        "I16": torch.int16,
        "U16": torch.uint16,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "I32": torch.int32,
        "U32": torch.uint32,
        "F32": torch.float32,
        "I64": torch.int64,
        "U64": torch.uint64,
        "F64": torch.float64,
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


class SafetensorsFile:
    """The tensors of one safetensors file, read through a private map so that parts are cheap.

    ``error`` is the exception type raised for every defect of the file, so that model and adapter readers share this
    class. Attributes: ``path``; ``metadata``, the header's string-to-string map (read-only).
    """

    def __init__(self, path: str | os.PathLike[str], error: type[PolyaccelError] = ModelLoadError) -> None:
        self.path = as_path(path)
        self._error = error
        data = map_file(self.path, error)
        header, begin = _read_header(data, str(self.path), error)
        metadata, entries = _check_header(header, begin, data.size, str(self.path), error)
        self.metadata: Mapping[str, str] = MappingProxyType(metadata)
        self._entries = entries
        self._begin = begin
        self._data: npt.NDArray[np.uint8] | None = data

    def names(self) -> tuple[str, ...]:
        """Every tensor's name, in the header's order."""
        return tuple(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self._entry(name).dtype

    def nbytes(self, name: str) -> int:
        entry = self._entry(name)
        return entry.stop - entry.start

    def read(self, name: str, rows: slice | None = None, cols: slice | None = None) -> torch.Tensor:
        """A CPU tensor, or the part ``rows`` x ``cols`` of it: a view of the map, not to be written to.

        A tensor whose bytes are not aligned to its item size is copied, as are booleans (their bytes are untrusted).
        Raises the file's error type for an unknown name, for slices that leave the shape, and after ``close()``.
        """
        entry = self._entry(name)
        data = self._open_data()
        tensor = _as_tensor(data[entry.start : entry.stop], entry)
        if rows is None and cols is None:
            return tensor
        what = f"{self.path}: tensor {name!r} of shape {list(entry.shape)}"
        if len(entry.shape) < (1 if cols is None else 2):
            raise self._error(f"{what}: it has too few dimensions to be sliced")
        if rows is not None:
            start, stop = slice_bounds(rows, entry.shape[0], what, self._error)
            tensor = tensor[start:stop]
        if cols is not None:
            start, stop = slice_bounds(cols, entry.shape[1], what, self._error)
            tensor = tensor[:, start:stop]
        return tensor

    def digest(self) -> bytes:
        """SHA-256 of the header and of a sample of each tensor (see ``Checkpoint.fingerprint``)."""
        data = self._open_data()
        digest = hashlib.sha256(data[: self._begin].tobytes())
        for entry in self._entries.values():
            start, stop = sample_bytes(entry.stop - entry.start)
            digest.update(data[entry.start + start : entry.start + stop].tobytes())
        return digest.digest()

    def close(self) -> None:
        """Forbid further reads. Idempotent; tensors already read keep the map alive."""
        self._data = None

    def _open_data(self) -> npt.NDArray[np.uint8]:
        if self._data is None:
            raise self._error(f"{self.path}: read after close()")
        return self._data

    def _entry(self, name: str) -> _Entry:
        entry = self._entries.get(name)
        if entry is None:
            raise self._error(f"{self.path}: there is no tensor {name!r}")
        return entry


def _as_tensor(raw: npt.NDArray[np.uint8], entry: _Entry) -> torch.Tensor:
    if raw.size == 0:
        return torch.empty(entry.shape, dtype=entry.dtype)
    if entry.dtype is torch.bool:
        return (torch.from_numpy(raw) != 0).view(entry.shape)
    if raw.ctypes.data % entry.dtype.itemsize:
        raw = raw.copy()
    return torch.from_numpy(raw).view(entry.dtype).view(entry.shape)


def _read_header(data: npt.NDArray[np.uint8], what: str, error: type[PolyaccelError]) -> tuple[dict[str, object], int]:
    if data.size < 8:
        raise error(f"{what}: {data.size} bytes are too few for a safetensors file")
    (length,) = struct.unpack("<Q", data[:8].tobytes())
    if length > _MAX_HEADER:
        raise error(f"{what}: header length {length} exceeds the limit of {_MAX_HEADER}; not a safetensors file?")
    if length < 2 or 8 + length > data.size:
        raise error(f"{what}: header length {length} does not fit in a file of {data.size} bytes; it is truncated")
    raw = data[8 : 8 + length].tobytes()
    if not raw.startswith(b"{"):
        raise error(f"{what}: the header does not begin with '{{'; not a safetensors file?")
    return parse_json_object(raw, f"{what}: header", error), 8 + int(length)


def _check_header(
    header: dict[str, object], begin: int, size: int, what: str, error: type[PolyaccelError]
) -> tuple[dict[str, str], dict[str, _Entry]]:
    metadata: dict[str, str] = {}
    raw = header.pop("__metadata__", None)
    if raw is not None:
        if not isinstance(raw, dict):
            raise error(f"{what}: __metadata__ is {type(raw).__name__}, expected an object of strings")
        for key, value in raw.items():
            if not isinstance(value, str):
                raise error(f"{what}: __metadata__[{key[:200]!r}] is {type(value).__name__}, expected a string")
            metadata[key] = value
    entries = {
        name: _check_entry(info, begin, size, f"{what}: tensor {name[:200]!r}", error) for name, info in header.items()
    }
    end = begin
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end:
            kind = "overlaps the one before it" if entry.start < end else "leaves a hole before it"
            raise error(f"{what}: tensor {name[:200]!r} at data offset {entry.start - begin} {kind} ({end - begin})")
        end = entry.stop
    if end != size:
        raise error(f"{what}: the tensors end at byte {end} but the file has {size}")
    return metadata, entries


def _check_entry(info: object, begin: int, size: int, what: str, error: type[PolyaccelError]) -> _Entry:
    if not isinstance(info, dict):
        raise error(f"{what}: its header entry is {type(info).__name__}, expected an object")
    label, shape, offsets = info.get("dtype"), info.get("shape"), info.get("data_offsets")
    dtype = _DTYPES.get(label) if isinstance(label, str) else None
    if dtype is None:
        raise error(f"{what}: dtype {str(label)[:60]!r} is not supported; known are {', '.join(_DTYPES)}")
    if not isinstance(shape, list) or len(shape) > _MAX_DIMS or not all(type(dim) is int and dim >= 0 for dim in shape):
        raise error(f"{what}: shape {str(shape)[:200]} is not a list of at most {_MAX_DIMS} non-negative integers")
    count = dtype.itemsize
    for dim in shape:
        count *= dim
        if count > size and 0 not in shape:
            raise error(f"{what}: shape {str(shape)[:200]} of {label} is larger than the file ({size} bytes)")
        if dim > 2**62:
            raise error(f"{what}: dimension {str(dim)[:60]} overflows")
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(type(offset) is int for offset in offsets)
        or not 0 <= offsets[0] <= offsets[1] <= size - begin
    ):
        raise error(f"{what}: data_offsets {str(offsets)[:200]} do not lie in the {size - begin} bytes of data")
    if offsets[1] - offsets[0] != count:
        raise error(f"{what}: data_offsets {offsets} do not hold the {count} bytes of {label}{shape}")
    return _Entry(dtype=dtype, shape=tuple(shape), start=begin + offsets[0], stop=begin + offsets[1])
