"""The oracle of routing and experts: published and hand-computed results, ties, and what is ambiguous."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from polyaccel_conformance.formats import FORMATS
from polyaccel_conformance.oracle.bounded import Bounded, Expected, finish
from polyaccel_conformance.oracle.functions import silu
from polyaccel_conformance.oracle.moe import Projection, Routing, experts, largest, route
from polyaccel_conformance.problems.moe_experts import MoeExpertsProblem, MoeExpertsProblems
from polyaccel_conformance.problems.moe_route import MoeRouteProblem, MoeRouteProblems
from tests.conformance.drawn import problems

GOLDENS = json.loads((Path(__file__).parents[1] / "goldens" / "moe.json").read_text())


def named(case: Mapping[str, object]) -> str:
    return str(case["name"])


# -- goldens -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("golden", GOLDENS["route"], ids=named)
def test_routing_agrees_with_what_was_found_by_hand(golden: Mapping[str, object]) -> None:
    logits = np.array([golden["logits"]])
    bias = None if golden["bias"] is None else np.array(golden["bias"])
    routed = route(logits, bias, Routing(**golden["routing"]))  # type: ignore[arg-type]
    assert routed.ids[0].tolist() == golden["ids"]
    np.testing.assert_allclose(routed.weights.value[0], golden["weights"], rtol=1e-14)


@pytest.mark.parametrize("golden", GOLDENS["experts"], ids=named)
def test_experts_agree_with_what_was_found_by_hand(golden: Mapping[str, object]) -> None:
    gate_up, down = np.array(golden["gate_up"]), np.array(golden["down"])
    n = gate_up.shape[1] // 2
    y = experts(
        np.array(golden["x"]),
        Projection(matrix=gate_up, bias=None, slices=(n, n)),
        Projection(matrix=down, bias=None, slices=(down.shape[1],)),
        np.array(golden["local"]),
        np.array(golden["weights"]),
        ((), ()),
        FORMATS["float32"],
    )
    np.testing.assert_allclose(y.value, golden["y"], rtol=1e-14)


# -- routing -----------------------------------------------------------------------------------------------------------


def test_equal_scores_are_taken_lowest_id_first_and_overlapping_ones_are_not_clear() -> None:
    scores = Bounded(np.array([[1.0, 2.0, 2.0, 1.0], [1.0, 2.0, 2.0001, 1.0]]), np.full((2, 4), 0.001))
    ids, clear = largest(scores, 2)
    assert ids.tolist() == [[1, 2], [2, 1]]
    assert clear.tolist() == [True, False]


def test_nearly_no_row_has_to_be_replaced_to_determine_its_ids() -> None:
    drawn = list(problems(MoeRouteProblems(), 400, 13))
    rows = sum(problem.case.dim("tokens") for problem in drawn)
    assert sum(problem.redrawn for problem in drawn if isinstance(problem, MoeRouteProblem)) <= 0.01 * rows


# -- experts -----------------------------------------------------------------------------------------------------------


def test_silu_is_bounded_by_its_slope_at_an_uncertain_argument() -> None:
    x = np.linspace(-30, 30, 2001)
    off = 0.01
    bound = silu(Bounded(x, np.full_like(x, off)), exp_ulps=2, divide_ulps=1).bound
    for shift in (-off, off, off / 3):
        moved = (x + shift) / (1 + np.exp(-(x + shift)))
        assert np.all(np.abs(moved - x / (1 + np.exp(-x))) <= bound)


def test_a_wrong_expert_is_seen() -> None:
    [problem] = problems(MoeExpertsProblems(), 1, 26, data=("integers",), dims__experts=(3,), dims__tokens=(5,))
    assert isinstance(problem, MoeExpertsProblem)
    expected = problem.expected()["y"]
    assert isinstance(expected, Expected)
    problem.local = np.roll(problem.local, 1, axis=0)
    other = problem.expected()["y"]
    assert isinstance(other, Expected)
    assert not np.array_equal(expected.value, other.value)


def test_finish_keeps_the_bound_above_the_rounding() -> None:
    value = Bounded(np.ones((1, 1)), np.full((1, 1), 1e-3))
    assert finish(value, FORMATS["bfloat16"]).tolerance[0, 0] > 2.0**-8
