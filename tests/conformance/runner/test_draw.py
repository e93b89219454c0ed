"""Drawn cases: valid, reproducible, on the edges, and simplest first."""

from __future__ import annotations

import importlib
import itertools
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, find, given, seed, settings
from hypothesis import strategies as st

from polyaccel_conformance.draw import TILES, boundary_integers, cases, examples, uniform
from polyaccel_conformance.multi.registry import RANKED_SETS
from polyaccel_conformance.problem import ProblemSet
from polyaccel_conformance.problems.registry import PROBLEM_SETS
from polyaccel_conformance.profiles import profile_of
from polyaccel_conformance.schedule import WAITING, drawn

SETS = pytest.mark.parametrize("problems", PROBLEM_SETS.values(), ids=list(PROBLEM_SETS))
LINEAR = PROBLEM_SETS["linear"]


@SETS
def test_drawn_cases_are_valid_and_differ(problems: ProblemSet) -> None:
    found = examples(problems, 12, 7)
    assert found
    assert len({case.key for case in found}) == len(found)
    for case in found:
        axes = {path: case.axes()[path] for path in problems.axes()}
        assert problems.mend(dict(axes)) == axes


def test_the_same_seed_draws_the_same_cases_and_another_one_others() -> None:
    assert examples(LINEAR, 20, 3) == examples(LINEAR, 20, 3)
    assert examples(LINEAR, 20, 3) != examples(LINEAR, 20, 4)


def test_what_a_seed_draws_does_not_depend_on_the_modules_that_are_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = [examples(LINEAR, 40, seed) for seed in range(5)]
    raw = _sizes_drawn_by_hypothesis(0)
    numbers = ", ".join(str(number) for number in range(103, 40_000, 83))
    (tmp_path / "imported_by_somebody.py").write_text(f"NUMBERS = [{numbers}]")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("imported_by_somebody")
    assert [examples(LINEAR, 40, seed) for seed in range(5)] == before
    # The module is one whose numbers Hypothesis does mix in.
    assert _sizes_drawn_by_hypothesis(0) != raw


def _sizes_drawn_by_hypothesis(base: int) -> list[int]:
    found: list[int] = []

    @seed(base)
    @settings(max_examples=400, database=None, phases=(Phase.generate,), suppress_health_check=list(HealthCheck))
    @given(st.integers(0, 2**32))
    def collect(number: int) -> None:
        found.append(number)

    collect()
    return found


def test_as_many_cases_are_drawn_as_were_asked_for() -> None:
    assert len(examples(LINEAR, 40, 1)) == 40
    assert examples(LINEAR, 0, 1) == ()


def _within_reach(scale: int) -> list[int]:
    """Sizes of k that were drawn, those of large cases left out."""
    far = {partial["dims.k"] for partial in LINEAR.large()}
    return [case.dim("k") for case in examples(LINEAR, 60, 1, scale=scale) if case.dim("k") not in far]


def test_a_larger_scale_reaches_larger_sizes() -> None:
    _, high = LINEAR.ranges()["dims.k"]
    listed = max(value for value in LINEAR.axes()["dims.k"] if isinstance(value, int))
    assert max(_within_reach(1)) <= max(high, listed)
    assert max(_within_reach(4)) > max(high, listed)


def test_a_few_drawn_cases_have_the_sizes_of_large_ones() -> None:
    far = {partial["dims.k"] for partial in LINEAR.large() if partial["dims.k"] > 4096}
    assert far
    drawn = [case.dim("k") for case in examples(LINEAR, 200, 1)]
    assert 1 <= sum(k in far for k in drawn) <= len(drawn) // 8


@pytest.mark.parametrize("base", range(5))
def test_drawn_cases_hold_most_triples_of_listed_values(base: int) -> None:
    # Hypothesis' own choices alone lack 45 to 61 of these 144 triples.
    problems = PROBLEM_SETS["silu_and_mul"]
    axes = problems.axes()
    have = {(case.dim("tokens"), case.dtype, case.axes()["data"]) for case in examples(problems, 500, base, scale=2)}
    assert len(set(itertools.product(axes["dims.tokens"], axes["dtype"], axes["data"])) - have) <= 40


def test_uniform_cases_are_the_same_for_the_same_seed_and_know_no_boundaries() -> None:
    assert uniform(LINEAR, 20, 3) == uniform(LINEAR, 20, 3) != uniform(LINEAR, 20, 4)
    drawn = [case.dim("k") for case in uniform(LINEAR, 300, 3)]
    low, high = LINEAR.ranges()["dims.k"]
    assert low <= min(drawn) <= max(drawn) <= high
    assert len(set(drawn)) > 150


def test_an_axis_is_drawn_within_its_limit() -> None:
    class Ranked(type(LINEAR)):  # type: ignore[misc]
        def axes(self) -> dict[str, object]:
            return {**super().axes(), "ranks": (1, 2, 4)}

    assert {case.ranks for case in examples(Ranked(), 40, 1, limits={"ranks": 2})} == {1, 2}


def test_hypothesis_finds_the_first_value_of_every_axis_simplest() -> None:
    case = find(cases(LINEAR), lambda case: True)
    assert {path: case.axes()[path] for path in LINEAR.axes()} == {p: v[0] for p, v in LINEAR.axes().items()}
    assert case.seed == 0


@given(low=st.integers(0, 5), high=st.integers(6, 2000), data=st.data())
def test_sizes_stay_within_their_range(low: int, high: int, data: st.DataObject) -> None:
    assert low <= data.draw(boundary_integers(low, high)) <= high


@pytest.mark.parametrize("tile", [tile for tile in TILES if tile <= 256])
@pytest.mark.parametrize("beside", [-1, 0, 1])
def test_the_neighbours_of_a_tile_are_drawn(tile: int, beside: int) -> None:
    assert find(boundary_integers(0, 300), lambda size: size == tile + beside) == tile + beside


def test_of_several_ranks_a_third_of_a_profiles_cases_is_drawn_and_no_fewer_than_quick_draws() -> None:
    problems = RANKED_SETS["sgmv"]
    counts = {name: len(drawn(problems, profile_of(name), 0, ranks=2)) for name in ("quick", "default", "certify")}
    assert counts == {"quick": 25, "default": 66, "certify": 333}
    assert len(drawn(PROBLEM_SETS["sgmv"], profile_of("default"), 0)) == 200


@pytest.mark.parametrize("ranks", [2, 4])
def test_few_cases_are_drawn_that_a_right_implementation_needs_seconds_for(ranks: int) -> None:
    problems = RANKED_SETS["all_reduce"]
    cases = [item.case for item in drawn(problems, profile_of("default"), 0, ranks=ranks)]
    waiting = [case for case in cases if problems.waits(case)]
    assert len(waiting) == WAITING
    assert sorted(str(case.structure["scenario"]) for case in waiting) == ["failing"] * 2 + ["withheld"] * 2
    assert not any(problems.waits(case) for case in cases if case.structure["scenario"] == "plain")
