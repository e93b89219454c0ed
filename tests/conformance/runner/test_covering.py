"""The covering list: every reachable pair, the same everywhere, and not long."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyaccel_conformance.case import Case, Choice
from polyaccel_conformance.covering import Pair, covered_pairs, covering, large
from polyaccel_conformance.problem import Problem, ProblemSet
from polyaccel_conformance.problems.registry import PROBLEM_SETS

STORED = Path(__file__).with_name("covering.txt")
UPDATE_VARIABLE = "POLYACCEL_UPDATE_SNAPSHOTS"


class Drawn(ProblemSet):
    """Axes given; ``mend`` forbids what ``excluded`` names."""

    operator = "linear"

    def __init__(self, axes: Mapping[str, Sequence[Choice]], excluded: Mapping[str, Choice] | None = None) -> None:
        self._axes, self._excluded = axes, excluded or {}

    def axes(self) -> Mapping[str, Sequence[Choice]]:
        return self._axes

    def mend(self, axes: dict[str, Choice]) -> dict[str, Choice] | None:
        if self._excluded and all(axes[path] == value for path, value in self._excluded.items()):
            return None
        return axes

    def problem(self, case: Case) -> Problem:
        raise NotImplementedError


@st.composite
def sized_axes(draw: st.DrawFn) -> dict[str, Sequence[Choice]]:
    sizes = draw(st.lists(st.integers(1, 6), min_size=2, max_size=7))
    return {f"dims.{chr(97 + i)}": tuple(range(size)) for i, size in enumerate(sizes)}


def all_pairs(axes: Mapping[str, Sequence[Choice]]) -> set[Pair]:
    return {
        Pair(first=one, first_value=v, second=two, second_value=w)
        for one, two in itertools.combinations(axes, 2)
        for v in axes[one]
        for w in axes[two]
    }


@given(axes=sized_axes())
def test_every_pair_is_covered_where_nothing_is_excluded(axes: dict[str, Sequence[Choice]]) -> None:
    found = covering(Drawn(axes))
    assert found.covered == all_pairs(axes)
    assert found.unreachable == ()
    longest = sorted((len(values) for values in axes.values()), reverse=True)
    # No list is shorter than the product of the two longest axes; a greedy one stays within a small factor of it.
    assert longest[0] * longest[1] <= len(found.cases) <= 2 * longest[0] * longest[1] + 8


@given(axes=sized_axes(), data=st.data())
def test_an_excluded_pair_is_called_unreachable_and_all_others_are_covered(
    axes: dict[str, Sequence[Choice]], data: st.DataObject
) -> None:
    axes = {path: (*values, 99) for path, values in axes.items()}
    one, two = data.draw(st.sampled_from(list(itertools.combinations(axes, 2))))
    found = covering(Drawn(axes, {one: 99, two: 99}))
    excluded = Pair(first=one, first_value=99, second=two, second_value=99)
    assert found.unreachable == (excluded,)
    assert found.covered == all_pairs(axes) - {excluded}


def test_truth_values_are_not_taken_for_integers() -> None:
    axes: dict[str, Sequence[Choice]] = {"dims.a": (0, 1, True, False), "dims.b": (1, 2)}
    rows: list[dict[str, Choice]] = [{"dims.a": 1, "dims.b": 1}]
    assert covered_pairs(axes, rows) == {Pair(first="dims.a", first_value=1, second="dims.b", second_value=1)}
    assert len(covering(Drawn(axes)).cases) == 8


def test_a_single_axis_has_every_value_once() -> None:
    assert [case.dims["a"] for case in covering(Drawn({"dims.a": (3, 1, 2)})).cases] == [3, 1, 2]


def test_an_axis_is_cut_to_its_limit_and_nothing_is_left_of_one_beyond_it() -> None:
    axes: dict[str, Sequence[Choice]] = {"ranks": (1, 2, 4), "dtype": ("float32", "float16")}
    assert {case.ranks for case in covering(Drawn(axes), {"ranks": 2}).cases} == {1, 2}
    assert covering(Drawn({**axes, "ranks": (2, 4)}), {"ranks": 1}).cases == ()


@pytest.mark.parametrize("problems", PROBLEM_SETS.values(), ids=list(PROBLEM_SETS))
def test_a_registered_operator_has_a_short_list_of_valid_cases(problems: ProblemSet) -> None:
    found = covering(problems)
    sizes = sorted((len(values) for values in problems.axes().values()), reverse=True)
    # Constraints cost some cases beyond what the two longest axes need.
    assert len(found.cases) <= max(170, int(1.3 * math.prod(sizes[:2])))
    assert len({case.key for case in found.cases}) == len(found.cases)
    for case in (*found.cases, *large(problems)):
        axes = {path: case.axes()[path] for path in problems.axes()}
        assert problems.mend(dict(axes)) == axes, "mending a mended case changes it"
    unreached = {(pair.first, pair.first_value) for pair in found.unreachable}
    unreached |= {(pair.second, pair.second_value) for pair in found.unreachable}
    reached = {(p.first, p.first_value) for p in found.covered} | {(p.second, p.second_value) for p in found.covered}
    assert unreached <= reached, "no value of an axis is unreachable altogether"


def digests() -> str:
    return "".join(f"{name} {covering(problems).digest()}\n" for name, problems in sorted(PROBLEM_SETS.items()))


def test_the_lists_are_the_stored_ones() -> None:
    """Equal digests on every platform. A change of axes changes them: then the suite's revision is raised."""
    actual = digests()
    if os.environ.get(UPDATE_VARIABLE):
        STORED.write_text(actual, encoding="utf-8")
    assert actual == STORED.read_text(encoding="utf-8"), f"if meant: {UPDATE_VARIABLE}=1 pytest {__file__}"


def test_the_list_depends_on_no_hash_seed() -> None:
    program = (
        "from polyaccel_conformance.covering import covering;"
        "from polyaccel_conformance.problems.registry import PROBLEM_SETS;"
        "print(covering(PROBLEM_SETS['linear']).digest())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert found == {covering(PROBLEM_SETS["linear"]).digest() + "\n"}
