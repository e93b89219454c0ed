"""What an aclnn function's phase 1 is called with: decoded, and as the bytes by which an equal call is known again."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

from .descriptor import ROOM, Decoder
from .registry import LATER

Key = tuple[Any, ...]

_HEAD = 64
_TENSOR = ctypes.c_char * (_HEAD + 8 * ROOM)
_ARRAY = ctypes.c_char * (16 + 8 * ROOM)
_WORD = ctypes.c_int64
_OPAQUE = frozenset({"pointer", "stream"})
"""Words whose target nobody knows: two calls with one address may still differ."""


def _tensor(handle: int) -> bytes:
    raw: bytes = _TENSOR.from_address(handle).raw
    values = 2 * raw[8] + raw[40]  # the counts' lowest bytes: torch has at most 64 axes
    return raw if values <= ROOM else ctypes.string_at(handle, _HEAD + 8 * values)


def _array(handle: int) -> bytes:
    raw: bytes = _ARRAY.from_address(handle).raw
    count = int.from_bytes(raw[8:16], "little")
    return raw if count <= ROOM else ctypes.string_at(handle, 16 + 8 * count)


def _members(handle: int, member: Callable[[int], bytes]) -> tuple[bytes, ...]:
    count = _WORD.from_address(handle + 8).value
    return tuple([member(one) if one else b"" for one in (_WORD * count).from_address(handle + 16)])


def _tensors(handle: int) -> tuple[bytes, ...]:
    return _members(handle, _tensor)


def _scalars(handle: int) -> tuple[bytes, ...]:
    return _members(handle, _array)


def _real(value: float) -> float | str:
    """Zero with its sign, which equality does not see; a NaN equals nothing, which is safe."""
    return value if value else str(value)


_BYTES: dict[str, Callable[[Any], Any]] = {
    "tensor": _tensor,
    "tensors": _tensors,
    "ints": _array,
    "bools": _array,
    "floats": _array,
    "scalar": _array,
    "number": _array,
    "scalars": _scalars,
    "double": _real,
    "float": _real,
}


class Arguments:
    """Of one function, by the words of its signature.

    Attributes:
        comparable: whether ``key``, with ``lists``, holds all that a rule can read of a call but the device's memory.
    """

    def __init__(
        self, words: Sequence[str], readers: Sequence[str | None], decoder: Decoder, lists_apart: bool = False
    ) -> None:
        self._count = len(words)
        # A null pointer is None whatever it points to; a data type is a number, of which 0 is one.
        self._readers = [
            (i, _text if word == "string" else getattr(decoder, word))
            for i, word in enumerate(readers)
            if word and word != "dtype"
        ]
        self._codes = [i for i, word in enumerate(readers) if word == "dtype"]
        self._dtype = decoder.dtype
        self._lists = [i for i, word in enumerate(words) if word == "ints"] if lists_apart else []
        self._ints = decoder.ints
        self._bytes = [(i, _BYTES[word]) for i, word in enumerate(words) if word in _BYTES and i not in self._lists]
        self.comparable = not _OPAQUE & set(words)

    def decoded(self, raw: Sequence[Any]) -> tuple[Any, ...]:
        """As the rule gets them, from C's arguments (more may follow)."""
        found = list(raw[: self._count])
        for i, read in self._readers:
            if found[i] is not None:
                found[i] = read(found[i])
        for i in self._codes:
            found[i] = self._dtype(found[i])
        return tuple(found)

    def key(self, raw: Sequence[Any]) -> Key:
        """Equal for two calls only if every descriptor, list and number in them is, addresses included.

        Of lists taken apart it says only which there are.
        """
        found = list(raw[: self._count])
        for i in self._lists:
            if found[i] is not None:
                found[i] = LATER
        for i, read in self._bytes:
            if found[i] is not None:
                found[i] = read(found[i])
        return tuple(found)

    def lists(self, raw: Sequence[Any]) -> tuple[tuple[int, ...] | None, ...]:
        """The values of the lists taken apart, from C's arguments."""
        return tuple([self._ints(raw[i]) for i in self._lists])

    def with_lists(self, decoded: Sequence[Any], lists: Sequence[Any]) -> tuple[Any, ...]:
        """A decoded call with other lists."""
        found = list(decoded)
        for i, one in zip(self._lists, lists, strict=True):
            found[i] = one
        return tuple(found)

    def without_lists(self, decoded: Sequence[Any]) -> tuple[Any, ...]:
        """A decoded call as the first part of its rule gets it."""
        return self.with_lists(decoded, [None if decoded[i] is None else LATER for i in self._lists])


def _text(value: bytes) -> str:
    return value.decode()
