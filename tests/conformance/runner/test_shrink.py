"""Minimal cases: found by single changes towards the first values, for any failure that depends on the axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given

from polyaccel_conformance.case import Case
from polyaccel_conformance.check import CaseResult, Failure
from polyaccel_conformance.draw import cases
from polyaccel_conformance.problems.registry import PROBLEM_SETS
from polyaccel_conformance.shrink import cost, shrink, simpler

LINEAR = PROBLEM_SETS["linear"]
FAILURE = Failure(check="values.exact", cause="wrong value", message="")


def result(case: Case, failed: bool) -> CaseResult:
    return CaseResult(
        case=case, failures=(FAILURE,) if failed else (), checks=("values.exact",), implementation="", kind=""
    )


def shrunk(start: Case, wrong: Callable[[Case], bool], seconds: float = 20.0) -> Case:
    def run(batch: Sequence[Case]) -> list[CaseResult]:
        return [result(case, wrong(case)) for case in batch]

    return shrink(LINEAR, result(start, True), lambda r: not r.passed, run, seconds).result.case


BUGS: dict[str, tuple[Callable[[Case], bool], dict[str, object]]] = {
    "large k": (lambda case: case.dim("k") > 40, {"dims.k": 41}),
    "one token too many": (lambda case: case.dim("tokens") % 16 == 1 and case.dim("tokens") > 1, {"dims.tokens": 17}),
    "a layout": (lambda case: case.layout("x") == "offset", {"layouts.x": "offset"}),
    "two together": (
        lambda case: case.dtype == "float16" and case.dim("n") >= 3,
        {"dtype": "float16", "dims.n": 3},
    ),
    "everything": (lambda case: True, {}),
}


@pytest.mark.parametrize("bug", BUGS)
@given(start=cases(LINEAR))
def test_a_failure_shrinks_to_what_it_needs(bug: str, start: Case) -> None:
    wrong, needed = BUGS[bug]
    first = {path: values[0] for path, values in LINEAR.axes().items()}
    if not wrong(start):
        start = Case.of("linear", {**start.axes(), **needed}, start.seed)  # type: ignore[dict-item]
    found = shrunk(start, wrong)
    assert wrong(found)
    expected = LINEAR.mend({**first, **needed})  # type: ignore[dict-item]
    assert expected is not None
    assert {path: found.axes()[path] for path in first} == expected
    assert found.seed == 0


@given(case=cases(LINEAR))
def test_every_step_is_cheaper_and_valid(case: Case) -> None:
    for candidate in simpler(LINEAR, case):
        assert cost(LINEAR, candidate) < cost(LINEAR, case)
        axes = {path: candidate.axes()[path] for path in LINEAR.axes()}
        assert LINEAR.mend(dict(axes)) == axes


def test_nothing_is_simpler_than_the_simplest() -> None:
    simplest = Case.of("linear", {path: values[0] for path, values in LINEAR.axes().items()})
    assert cost(LINEAR, simplest) == 0
    assert list(simpler(LINEAR, simplest)) == []


def test_another_failure_does_not_count() -> None:
    start = Case.of("linear", {path: values[-1] for path, values in LINEAR.axes().items()}, 5)

    def run(batch: Sequence[Case]) -> list[CaseResult]:
        return [result(case, failed=False) for case in batch]

    assert shrink(LINEAR, result(start, True), lambda r: not r.passed, run, 20.0).result.case == start


def test_it_ends_when_its_time_is_over() -> None:
    start = Case.of("linear", {path: values[-1] for path, values in LINEAR.axes().items()}, 5)
    tried: list[Case] = []

    def run(batch: Sequence[Case]) -> list[CaseResult]:
        tried.extend(batch)
        return [result(case, failed=False) for case in batch]

    assert shrink(LINEAR, result(start, True), lambda r: not r.passed, run, 0.0).result.case == start
    assert len(tried) <= 2
