"""The covering list: few cases in which every pair of axis values occurs together.

A greedy construction in the manner of AETG (Cohen, Dalal, Fredman and Patton, 1997). Integers only and no library
randomness, so that the list is the same on every platform and in every version of Python.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from polyaccel_conformance.case import Case, Choice
from polyaccel_conformance.problem import ProblemSet

Axes = Mapping[str, Sequence[Choice]]

CANDIDATES = 6
"""Completions tried for each case; the one with the most new pairs is taken."""
ATTEMPTS = 24
"""Completions tried before a pair is called unreachable."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two axes and a value of each."""

    first: str
    first_value: Choice
    second: str
    second_value: Choice


@dataclass(frozen=True, slots=True, kw_only=True)
class Covering:
    """The list, and what it covers.

    ``unreachable``: pairs that no completion kept, since the operator's constraints exclude them.
    """

    cases: tuple[Case, ...]
    covered: frozenset[Pair]
    unreachable: tuple[Pair, ...]

    def digest(self) -> str:
        """Names the list: equal on every platform, different as soon as one case is."""
        return hashlib.sha256("".join(case.key for case in self.cases).encode()).hexdigest()[:16]


def covering(problems: ProblemSet, limits: Mapping[str, int] | None = None) -> Covering:
    """The covering list of an operator.

    Args:
        limits: largest value of an integer axis, such as ``{"ranks": 2}`` where only two devices exist. Where nothing
            is left of an axis there is no case.
    """
    axes = {path: _within(values, (limits or {}).get(path)) for path, values in problems.axes().items()}
    if any(not values for values in axes.values()):
        return Covering(cases=(), covered=frozenset(), unreachable=())
    search = _Search(problems, axes)
    rows = list(search.rows())
    cases = tuple(_case(problems, row, index) for index, row in enumerate(rows))
    return Covering(cases=cases, covered=covered_pairs(axes, rows), unreachable=tuple(search.unreachable))


def covered_pairs(axes: Axes, rows: Sequence[Mapping[str, Choice]]) -> frozenset[Pair]:
    """Which pairs of listed axis values occur together in some row."""
    paths = list(axes)
    found: set[Pair] = set()
    for row in rows:
        listed = [path for path in paths if path in row and _place(axes[path], row[path]) is not None]
        for i, first in enumerate(listed):
            for second in listed[i + 1 :]:
                found.add(Pair(first=first, first_value=row[first], second=second, second_value=row[second]))
    return frozenset(found)


def fixed_seed(operator: str, index: int) -> int:
    """The data seed of the ``index``-th case of an operator's fixed list."""
    return int.from_bytes(hashlib.sha256(f"{operator}:{index}".encode()).digest()[:4], "little")


def large(problems: ProblemSet) -> tuple[Case, ...]:
    """The fixed cases beyond the sizes of the covering list (:meth:`ProblemSet.large`)."""
    first = {path: values[0] for path, values in problems.axes().items()}
    cases: list[Case] = []
    for index, partial in enumerate(problems.large()):
        mended = problems.mend({**first, **partial})
        if mended is not None:
            cases.append(_case(problems, mended, 1_000_000 + index))
    return tuple(cases)


def _case(problems: ProblemSet, row: Mapping[str, Choice], index: int) -> Case:
    return Case.of(problems.operator, row, fixed_seed(problems.operator, index))


def _within(values: Sequence[Choice], limit: int | None) -> tuple[Choice, ...]:
    if limit is None:
        return tuple(values)
    return tuple(value for value in values if not isinstance(value, int) or isinstance(value, bool) or value <= limit)


def _place(values: Sequence[Choice], value: Choice) -> int | None:
    """Where a value is listed; True and 1 are different values."""
    for place, listed in enumerate(values):
        if listed == value and type(listed) is type(value):
            return place
    return None


class _Search:
    """Values are numbered through all axes; ``missing[v]`` is the set, as bits, of values not yet seen beside ``v``."""

    def __init__(self, problems: ProblemSet, axes: Mapping[str, tuple[Choice, ...]]) -> None:
        self._problems = problems
        self._axes = axes
        self._paths = list(axes)
        starts, total = [], 0
        for values in axes.values():
            starts.append(total)
            total += len(values)
        self._starts, self._sizes = starts, [len(values) for values in axes.values()]
        everything = (1 << total) - 1
        self._missing: list[int] = []
        for start, size in zip(self._starts, self._sizes, strict=True):
            own = ((1 << size) - 1) << start
            self._missing += [everything & ~own] * size
        self._uses = [0] * total
        self._words = _words("".join(self._paths))
        self.unreachable: list[Pair] = []

    def rows(self) -> Iterator[dict[str, Choice]]:
        if len(self._paths) == 1:
            # No pairs: every value once.
            for value in self._axes[self._paths[0]]:
                row = self._problems.mend({self._paths[0]: value})
                if row is not None:
                    yield row
            return
        while (pair := self._first_missing()) is not None:
            best: tuple[int, dict[str, Choice], list[int]] | None = None
            for attempt in range(ATTEMPTS):
                if attempt >= CANDIDATES and best is not None:
                    break
                row = self._problems.mend(self._named(self._complete(pair, attempt)))
                if row is None:
                    continue
                numbers = self._numbers(row)
                if pair[0] in numbers and pair[1] in numbers:
                    gain = self._gain(numbers)
                    if best is None or gain > best[0]:
                        best = (gain, row, numbers)
            if best is None:
                self._give_up(pair)
                continue
            self._cover(best[2])
            yield best[1]

    def _first_missing(self) -> tuple[int, int] | None:
        # Values of long axes first: what is needed there decides the length of the list.
        for value in sorted(range(len(self._missing)), key=lambda v: -self._missing[v].bit_count()):
            if self._missing[value]:
                low = self._missing[value] & -self._missing[value]
                return value, low.bit_length() - 1
            return None
        return None

    def _complete(self, pair: tuple[int, int], attempt: int) -> list[int]:
        """A value of every axis, the pair's among them: each the one that adds most new pairs to those chosen before,
        of equals the least used."""
        chosen = {self._axis(number): number for number in pair}
        bits = (1 << pair[0]) | (1 << pair[1])
        open_axes = [axis for axis in range(len(self._paths)) if axis not in chosen]
        for axis in self._shuffled(open_axes):
            start, size = self._starts[axis], self._sizes[axis]
            turn = next(self._words) % size
            order = [start + (turn + i) % size for i in range(size)]
            if attempt >= CANDIDATES:
                # So far every completion was excluded; greed would choose the same again.
                number = order[0]
            else:
                number = max(order, key=lambda v: ((self._missing[v] & bits).bit_count(), -self._uses[v]))
            chosen[axis] = number
            bits |= 1 << number
        return [chosen[axis] for axis in range(len(self._paths))]

    def _shuffled(self, items: list[int]) -> list[int]:
        items = list(items)
        for last in range(len(items) - 1, 0, -1):
            other = next(self._words) % (last + 1)
            items[last], items[other] = items[other], items[last]
        return items

    def _axis(self, number: int) -> int:
        return max(axis for axis, start in enumerate(self._starts) if start <= number)

    def _named(self, numbers: Sequence[int]) -> dict[str, Choice]:
        return {
            path: self._axes[path][number - start]
            for path, number, start in zip(self._paths, numbers, self._starts, strict=True)
        }

    def _numbers(self, row: Mapping[str, Choice]) -> list[int]:
        """Numbers of a row's values; what mending put outside of the list has none."""
        numbers: list[int] = []
        for path, start in zip(self._paths, self._starts, strict=True):
            if path in row and (place := _place(self._axes[path], row[path])) is not None:
                numbers.append(start + place)
        return numbers

    def _gain(self, numbers: Sequence[int]) -> int:
        bits = sum(1 << number for number in numbers)
        return sum((self._missing[number] & bits).bit_count() for number in numbers)

    def _cover(self, numbers: Sequence[int]) -> None:
        bits = sum(1 << number for number in numbers)
        for number in numbers:
            self._missing[number] &= ~bits
            self._uses[number] += 1

    def _give_up(self, pair: tuple[int, int]) -> None:
        first, second = sorted(pair)
        self._missing[first] &= ~(1 << second)
        self._missing[second] &= ~(1 << first)
        one, two = self._axis(first), self._axis(second)
        self.unreachable.append(
            Pair(
                first=self._paths[one],
                first_value=self._axes[self._paths[one]][first - self._starts[one]],
                second=self._paths[two],
                second_value=self._axes[self._paths[two]][second - self._starts[two]],
            )
        )


def _words(text: str) -> Iterator[int]:
    """Pseudorandom integers that depend on the text alone (SplitMix64)."""
    state = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
    mask = (1 << 64) - 1
    while True:
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        yield z ^ (z >> 31)
