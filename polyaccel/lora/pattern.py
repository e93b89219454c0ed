"""PEFT's patterns from module names to values (``rank_pattern``, ``alpha_pattern``), safe on untrusted files.

A key matches a module when the regular expression ``(.*\\.)?(key)$`` matches its name; the first key in file order wins
(``peft.utils.other.get_pattern_key``). Keys come from an untrusted file, so that an expression whose matching time may
explode is refused, and adapters that name every module (EVA writes one key a module) are looked up without a scan.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Generic, TypeVar

from polyaccel.backend.errors import AdapterIncompatible

MAX_NAME = 128
MAX_KEY = 1024
MAX_KEYS = 65536
_BUDGET = 12e6
_PLAIN = re.compile(r"[A-Za-z0-9_.\-]+")
_REPEAT = re.compile(r"[*+?]|\{\d*,?\d*\}")

V = TypeVar("V")


class PatternTable(Generic[V]):
    """An ordered mapping from PEFT pattern keys to values.

    Raises:
        AdapterIncompatible: a key that is no valid expression, is too long, or whose matching time may explode.
    """

    def __init__(self, patterns: Mapping[str, V], field: str) -> None:
        if len(patterns) > MAX_KEYS:
            raise AdapterIncompatible(f"{field} has {len(patterns)} keys; at most {MAX_KEYS} are read")
        self._values: list[tuple[str, V]] = list(patterns.items())
        self._exact: dict[str, int] = {}
        self._by_length: dict[int, list[tuple[int, int]]] = {}
        self._scanned: list[tuple[int, re.Pattern[str]]] = []
        cost = 0.0
        for index, (key, _) in enumerate(self._values):
            if _PLAIN.fullmatch(key):
                self._exact.setdefault(key, index)
                dots = key.count(".")
                self._by_length.setdefault(len(key), []).append((dots, index))
                continue
            cost += _matching_cost(key, field)
            if cost > _BUDGET:
                raise AdapterIncompatible(
                    f"{field} key {key!r} (with those before it) may take too long to match; name the modules in full"
                )
            self._scanned.append((index, _compile(key, field)))

    def __len__(self) -> int:
        return len(self._values)

    def get(self, name: str) -> V | None:
        """Value of the first key that matches the module name, or None."""
        found = min((i for i in (self._plain(name), self._scan(name)) if i is not None), default=None)
        return None if found is None else self._values[found][1]

    def _scan(self, name: str) -> int | None:
        return next((index for index, expression in self._scanned if expression.match(name)), None)

    def _plain(self, name: str) -> int | None:
        found: list[int] = []
        start = 0
        while start >= 0 and self._exact:
            suffix = name[start:]
            exact = self._exact.get(suffix)
            if exact is not None:
                found.append(exact)
            # A dot in a key matches any character, so that a key with more dots than the name may match as well.
            dots = suffix.count(".")
            for key_dots, index in self._by_length.get(len(suffix), ()):
                if key_dots > dots and _dots_match(self._values[index][0], suffix):
                    found.append(index)
            start = name.find(".", start) + 1 or -1
        return min(found, default=None)


def _dots_match(key: str, text: str) -> bool:
    return all(k in (".", c) for k, c in zip(key, text, strict=True))


def _compile(key: str, field: str) -> re.Pattern[str]:
    try:
        return re.compile(rf"(.*\.)?({key})$")
    except (re.error, OverflowError, RecursionError) as error:
        raise AdapterIncompatible(f"{field} key {key!r} is not a valid regular expression: {error}") from error


def _matching_cost(key: str, field: str) -> float:
    """Bound on the ways an expression can match a name of ``MAX_NAME`` characters; infinite where none is known."""
    if len(key) > MAX_KEY:
        raise AdapterIncompatible(f"{field} has a key of {len(key)} characters; at most {MAX_KEY} are read")
    repeats = 0
    branches = 1
    # One entry an open group: alternatives so far, and whether anything inside can match in more than one way.
    groups: list[list[int]] = [[1, 0]]
    at = 0
    while at < len(key):
        char = key[at]
        if char == "\\":
            if key[at + 1 : at + 2].isdigit():
                return math.inf
            at += 2
        elif char == "[":
            at = _class_end(key, at)
        elif key.startswith(("(?P=", "(?("), at):
            return math.inf
        elif char == "(":
            groups.append([1, 0])
            at += 3 if key.startswith("(?", at) else 1
        elif char == "|":
            groups[-1][0] += 1
            at += 1
        elif char == ")":
            alternatives, ambiguous = groups.pop() if len(groups) > 1 else [1, 0]
            branches *= alternatives
            ambiguous |= alternatives > 1
            at += 1
            if ambiguous and _REPEAT.match(key, at):
                return math.inf
            groups[-1][1] |= ambiguous
        elif repeat := _REPEAT.match(key, at):
            repeats += 1
            groups[-1][1] = 1
            at = repeat.end()
            at += key.startswith("?", at)
        else:
            at += 1
    branches *= groups[0][0]
    return branches * math.pow(MAX_NAME, repeats) / math.factorial(repeats)


def _class_end(key: str, at: int) -> int:
    at += 1
    if key.startswith("^", at):
        at += 1
    first = at
    while at < len(key):
        if key[at] == "\\":
            at += 2
            continue
        if key[at] == "]" and at > first:
            return at + 1
        at += 1
    return at
