"""Typed access to a configuration that nobody vouches for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeVar

from polyaccel.backend.errors import ModelLoadError

_Number = TypeVar("_Number", int, float)


class ConfigValues:
    """Values of a JSON-like object, type and range checked; errors name the key, its value and what is accepted.

    A key that is absent or null takes the default; a default of None makes it required. ``where`` prefixes keys in
    messages.
    """

    def __init__(self, values: Mapping[str, object], *, where: str = "") -> None:
        self._values = values
        self._where = where

    def has(self, key: str) -> bool:
        """Whether the key is there, null included."""
        return key in self._values

    def is_missing(self, key: str) -> bool:
        """Whether the key is absent or null."""
        return self._values.get(key) is None

    def integer(self, key: str, default: int | None, low: int, high: int) -> int:
        """An integer within low..high; the default is not range-checked."""
        value = self._values.get(key)
        if value is None:
            return self._default(key, default)
        if type(value) is not int or not low <= value <= high:
            raise self._wrong(key, value, f"an integer from {low} to {high}")
        return value

    def number(self, key: str, default: float | None, low: float, high: float) -> float:
        """A finite number within low..high; the default is not range-checked."""
        value = self._values.get(key)
        if value is None:
            return self._default(key, default)
        # NOTE: compared before conversion, because a JSON integer can be too large for a float.
        if type(value) not in (int, float) or not (low <= value <= high and math.isfinite(value)):  # type: ignore[operator, arg-type]
            raise self._wrong(key, value, f"a number from {low:g} to {high:g}")
        return float(value)  # type: ignore[arg-type]

    def numbers(self, key: str, low: float, high: float) -> tuple[float, ...]:
        """A list of finite numbers, each within low..high; required."""
        value = self._values.get(key)
        if not isinstance(value, (list, tuple)):
            raise self._wrong(key, value, "a list of numbers")
        items = ConfigValues({str(index): item for index, item in enumerate(value)}, where=f"{self._where}{key}.")
        return tuple(items.number(str(index), None, low, high) for index in range(len(value)))

    def flag(self, key: str, default: bool) -> bool:
        value = self._values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def text(self, key: str, default: str) -> str:
        value = self._values.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self._wrong(key, value, "a string")
        return value

    def strings(self, key: str) -> tuple[str, ...] | None:
        """A list of strings, or None where the key is missing."""
        value = self._values.get(key)
        if value is None:
            return None
        if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
            raise self._wrong(key, value, "a list of strings")
        return tuple(value)

    def ids(self, key: str, high: int) -> tuple[int, ...]:
        """A token id or a list of them, each below ``high``; empty where the key is missing."""
        value = self._values.get(key)
        if value is None:
            return ()
        items = value if isinstance(value, (list, tuple)) else (value,)
        if not all(type(item) is int and 0 <= item < high for item in items):
            raise self._wrong(key, value, f"token ids from 0 to {high - 1}")
        return tuple(items)

    def _default(self, key: str, default: _Number | None) -> _Number:
        if default is None:
            raise ModelLoadError(f"config {self._where + key!r} is missing")
        return default

    def _wrong(self, key: str, value: object, expected: str) -> ModelLoadError:
        return ModelLoadError(f"config {self._where + key!r} is {str(value)[:80]}, expected {expected}")
