"""Drawn cases: Hypothesis chooses structure and a data seed, never elements.

Hypothesis likes extremes and draws again in one axis what it drew in another: a quarter of silu_and_mul's cases had no
token. That finds what an even draw does not, and passes by single values of an axis for hundreds of cases. So half of
the cases keep no more than the seed that it chose, and every axis of theirs is drawn evenly.

Drawing is separate from running: a profile's examples of an operator are drawn first, as values, and may then run in
any process. The simplest choice of every axis is its first value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar
from unittest import mock

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.internal.conjecture import providers

from polyaccel_conformance.case import Case, Choice
from polyaccel_conformance.problem import ProblemSet
from polyaccel_conformance.words import Source

T = TypeVar("T")
TILES = (16, 32, 64, 128, 256, 512, 1024)
SEEDS = 2**32
EVEN = 2
"""One drawn case in so many has every axis drawn evenly."""
FAR = 8
"""One drawn case in so many has the sizes of one of the operator's large cases."""


def cases(
    problems: ProblemSet, *, scale: float = 1, limits: Mapping[str, int] | None = None
) -> st.SearchStrategy[Case]:
    """Valid cases of an operator.

    Args:
        scale: factor of the upper end of the sizes' ranges.
        limits: largest value of an integer axis.
    """
    ranges, limits = problems.ranges(), limits or {}
    axes = {
        path: _Axis.of(_within(values, limits.get(path)), ranges.get(path), scale)
        for path, values in problems.axes().items()
    }
    choices = {path: axis.strategy() for path, axis in axes.items()}
    far = _sizes(problems.large())

    @st.composite
    def drawn(draw: Callable[[st.SearchStrategy[Choice]], Choice]) -> Case | None:
        chosen = {path: draw(choice) for path, choice in choices.items()}
        data = draw(st.integers(0, SEEDS - 1))
        assert isinstance(data, int)
        if data:
            # From a hash: parts of what Hypothesis has drawn it draws again. The simplest data keep the simplest case.
            source = Source(data)
            name = str(sorted(map(str, chosen.items())))
            if _one_of(range(EVEN), source, f"even {name}") == 0:
                chosen = {path: axis.even(source, f"{path} {name}") for path, axis in axes.items()}
            chosen |= _far(far, source, name)
        row = problems.mend(chosen)
        return None if row is None else Case.of(problems.operator, row, data)

    return drawn().filter(lambda case: case is not None)  # type: ignore[return-value]


def examples(
    problems: ProblemSet, count: int, base: int, *, scale: float = 1, limits: Mapping[str, int] | None = None
) -> tuple[Case, ...]:
    """``count`` different cases drawn under seed ``base``; fewer where the operator has no more."""
    found: dict[str, Case] = {}
    if not count:
        return ()

    # Half as many again: Hypothesis repeats itself where axes are few.
    @seed(base)
    @settings(
        max_examples=count + count // 2,
        deadline=None,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(cases(problems, scale=scale, limits=limits))
    def collect(case: Case) -> None:
        found.setdefault(case.key, case)

    with _same_everywhere():
        collect()
    return tuple(found.values())[:count]


@contextmanager
def _same_everywhere() -> Iterator[None]:
    """Inside, what a seed draws depends on the version of Hypothesis alone.

    Since 6.131 it mixes in the numbers that stand in the source of imported modules, unless these are installed: a seed
    would draw otherwise from a checkout than from a wheel, and with other plugins imported.
    """
    if not hasattr(providers, "_get_local_constants"):
        yield
        return
    cache = type(providers.CONSTANTS_CACHE)(1024)
    with (
        mock.patch.object(providers, "_get_local_constants", providers.Constants),  # type: ignore[attr-defined]
        mock.patch.object(providers, "CONSTANTS_CACHE", cache),
    ):
        yield


def uniform(
    problems: ProblemSet, count: int, base: int, *, limits: Mapping[str, int] | None = None
) -> tuple[Case, ...]:
    """``count`` cases with every axis drawn evenly from its range, or its listed values where it has none, whatever is
    special among them: what shows how rare a bug is."""
    axes, ranges, limits = problems.axes(), problems.ranges(), limits or {}
    found: list[Case] = []
    for number in range(count):
        source = Source(base * 1_000_003 + number)
        row: dict[str, Choice] = {}
        for path, values in axes.items():
            low, high = ranges.get(path, (0, -1))
            row[path] = _one_of(range(low, high + 1) or _within(values, limits.get(path)), source, path)
        mended = problems.mend(row)
        if mended is not None:
            found.append(Case.of(problems.operator, mended, int(source.integers("seed", (1,), 0, SEEDS - 1)[0])))
    return tuple(found)


def _far(sizes: Sequence[Mapping[str, Choice]], source: Source, name: str) -> Mapping[str, Choice]:
    """The sizes of a large case, for one drawn case in so many."""
    if not sizes:
        return {}
    index = _one_of(range(FAR * len(sizes)), source, f"far {name}")
    return sizes[index] if index < len(sizes) else {}


def _sizes(large: Sequence[Mapping[str, Choice]]) -> list[dict[str, Choice]]:
    """The different sizes of large cases, whatever else they are."""
    found: list[dict[str, Choice]] = []
    for partial in large:
        sizes = {path: value for path, value in partial.items() if path.startswith("dims.")}
        if sizes and sizes not in found:
            found.append(sizes)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Axis:
    """What one axis is drawn from: its listed values, and half of the time its range where it has one."""

    listed: Sequence[Choice]
    plain: range = range(0)
    near: Sequence[int] = ()

    @classmethod
    def of(cls, listed: Sequence[Choice], bounds: tuple[int, int] | None, scale: float) -> _Axis:
        if bounds is None:
            return cls(listed=listed)
        low, high = bounds[0], max(int(bounds[1] * scale), bounds[0])
        return cls(listed=listed, plain=range(low, high + 1), near=_near_tiles(low, high))

    def strategy(self) -> st.SearchStrategy[Choice]:
        listed: st.SearchStrategy[Choice] = st.sampled_from(self.listed)
        return st.one_of(listed, boundary_integers(self.plain[0], self.plain[-1])) if self.plain else listed

    def even(self, source: Source, name: str) -> Choice:
        """By the same shares, and each value of a share as often as another."""
        plain, near = self.plain or self.listed, self.near or self.plain or self.listed
        share = _one_of((self.listed, self.listed, near, plain), source, f"where {name}")
        return _one_of(share, source, name)


def _one_of(values: Sequence[T], source: Source, name: str) -> T:
    return values[int(source.integers(name, (1,), 0, len(values) - 1)[0])]


def _within(values: Sequence[Choice], limit: int | None) -> list[Choice]:
    return [v for v in values if limit is None or not isinstance(v, int) or isinstance(v, bool) or v <= limit]


def boundary_integers(low: int, high: int) -> st.SearchStrategy[int]:
    """``low..high``, half of the time a multiple of a tile or its neighbour."""
    near = _near_tiles(low, high)
    plain = st.integers(low, high)
    return st.one_of(plain, st.sampled_from(near)) if near else plain


def _near_tiles(low: int, high: int) -> list[int]:
    return sorted(
        {
            size
            for tile in TILES
            for multiple in (1, 2, 3)
            for size in (tile * multiple - 1, tile * multiple, tile * multiple + 1)
            if low <= size <= high
        }
    )
