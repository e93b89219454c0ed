"""The bounds of routing and experts hold for every legitimate implementation, and for no coarser one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from polyaccel_conformance.formats import FORMATS
from polyaccel_conformance.oracle.bounded import Bounded, Expected, finish
from polyaccel_conformance.oracle.functions import silu
from polyaccel_conformance.oracle.moe import Projection, Routing, experts, largest, route
from polyaccel_conformance.problem import Problem
from polyaccel_conformance.problems.moe_experts import MoeExpertsProblem, MoeExpertsProblems
from polyaccel_conformance.problems.moe_route import MoeRouteProblem, MoeRouteProblems
from tests.conformance.drawn import Emulation, operand, problems, survey
from tests.conformance.emulation import BF16, F16, LEGITIMATE, LOWER, f32, rounding, sum_terms, tf32

Floats = npt.NDArray[np.float64]
Round = Callable[[npt.ArrayLike], Floats]
GOLDENS = json.loads((Path(__file__).parents[1] / "goldens" / "moe.json").read_text())
RANDOM = ("normal", "levels", "pairs", "tied", "wide")
ULP = 2.0**-23


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


def exp(x: Floats, how: str) -> Floats:
    """Within two units in the last place, in several ways; ``base two`` rounds the scaled argument."""
    with np.errstate(over="ignore"):
        if how == "low":
            return f32(f32(np.exp(x)) * (1 - 2 * ULP))
        if how == "high":
            return f32(f32(np.exp(x)) * (1 + 1.9 * ULP))
        return f32(np.exp(x))


def emulated_route(
    problem: Problem, how: str, *, exps: str = "nearest", to: Round = f32, subtract: bool = True
) -> Mapping[str, Floats]:
    assert isinstance(problem, MoeRouteProblem)
    logits, routing = operand(problem, "logits"), problem.routing
    ids = np.asarray(problem.expected()["ids"].values)

    def softmax(x: Floats) -> Floats:
        shifted = to(x - x.max(-1, keepdims=True)) if subtract else x
        mass = to(exp(shifted, exps))
        return to(mass / to(sum_terms(mass, how))[:, None])

    if routing.scoring == "softmax_topk":
        weights = np.take_along_axis(softmax(logits), ids, -1)
    elif routing.scoring == "topk_softmax":
        weights = softmax(np.take_along_axis(logits, ids, -1))
    else:
        weights = np.take_along_axis(to(1 / to(1 + to(exp(-logits, exps)))), ids, -1)
    if routing.renormalise:
        weights = to(weights / to(sum_terms(weights, how))[:, None])
    return {"weights": to(weights * routing.scale)}


ROUTES: Mapping[str, Emulation] = {
    **{how: partial(emulated_route, how=how) for how in LEGITIMATE},
    "exp two ulps low": partial(emulated_route, how="sequential", exps="low"),
    "exp two ulps high": partial(emulated_route, how="chunk16 truncating", exps="high"),
    "nothing subtracted": partial(emulated_route, how="pairwise", subtract=False),
}


def weights_only(problem: Problem) -> Problem:
    problem.expected = lambda found=problem.expected: {"weights": found()["weights"], "ids": found()["ids"]}  # type: ignore[method-assign]
    return problem


def survey_routes(
    emulations: Mapping[str, Emulation], count: int, seed: int, **axes: tuple[object, ...]
) -> dict[str, float]:
    found = dict.fromkeys(emulations, 0.0)
    for problem in problems(MoeRouteProblems(), count, seed, **axes):  # type: ignore[arg-type]
        expected = problem.expected()["weights"]
        assert isinstance(expected, Expected)
        for name, emulate in emulations.items():
            got = FORMATS["float32"].round(emulate(problem)["weights"])
            with np.errstate(all="ignore"):
                ratio = np.abs(got - expected.value) / expected.tolerance
            found[name] = max(found[name], float(ratio.max(initial=0.0)))
    return found


def test_every_legitimate_routing_is_within_the_bound_and_comes_near_it() -> None:
    found = survey_routes(ROUTES, 800, 11)
    assert max(found.values()) <= 1, found
    assert max(found.values()) >= 0.1, found


@pytest.mark.parametrize("lower", [BF16.round, F16.round, tf32], ids=["bfloat16", "float16", "tf32"])
def test_routing_in_a_lower_class_is_beyond_the_bound(lower: Round) -> None:
    found = survey_routes({"lower": partial(emulated_route, how="sequential", to=lower)}, 60, 12)
    assert found["lower"] > 1


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


def emulated_experts(
    problem: Problem,
    how: str,
    *,
    kept: bool = False,
    kept_h: bool = False,
    to: Round = f32,
    operands: Round | None = None,
) -> Mapping[str, Floats]:
    """Pair by pair; ``kept``: gate_up and act in x's dtype; ``kept_h``: h too."""
    assert isinstance(problem, MoeExpertsProblem)
    keep = rounding(FORMATS[problem.case.dtype])
    x, weights = operand(problem, "x"), operand(problem, "weights")
    read = operands if operands is not None else lambda values: np.asarray(values, dtype=np.float64)
    deltas = {site: problem._deltas(weight) for site, weight in (("up", problem.gate_up), ("down", problem.down))}

    def product(row: Floats, matrix: Floats) -> Floats:
        return to(sum_terms((read(row)[None, :] * read(matrix))[:, :], how)) if matrix.size else np.zeros(len(matrix))

    def project(row: Floats, weight: object, site: str, token: int, expert: int) -> Floats:
        projection = weight.projection()  # type: ignore[attr-defined]
        y = product(row, projection.matrix[expert])
        if projection.bias is not None:
            y = to(y + projection.bias[expert])
        y = keep(y) if kept and site == "up" else y
        starts = np.cumsum([0, *projection.slices])
        for delta in deltas[site]:
            if delta.mix[token]:
                h = product(row, delta.a[expert])
                h = keep(h) if kept_h else h
                part = slice(starts[delta.slice], starts[delta.slice + 1])
                y[part] = to(y[part] + product(to(h * delta.mix[token]), delta.b[expert]))
        return keep(y) if kept and site == "up" else y

    out = np.zeros((x.shape[0], problem.down.matrix.shape[1]))
    for token in range(x.shape[0]):
        for choice, expert in enumerate(problem.local[token].tolist()):
            if expert < 0:
                continue
            gate, up = np.split(project(x[token], problem.gate_up, "up", token, expert), 2)
            with np.errstate(over="ignore"):
                inner = to(to(gate / to(1 + to(np.exp(-gate)))) * up)
            y = project(keep(inner) if kept else inner, problem.down, "down", token, expert)
            out[token] = to(out[token] + to(weights[token, choice] * y))
    return {"y": out}


EXPERTS: Mapping[str, Emulation] = {
    **{how: partial(emulated_experts, how=how) for how in ("sequential", "pairwise", "split-K")},
    "chunk16 truncating": partial(emulated_experts, how="chunk16 truncating"),
    "everything kept": partial(emulated_experts, how="sequential", kept=True, kept_h=True),
    "h kept": partial(emulated_experts, how="chunk16 aligned", kept_h=True),
}
SMALL: Mapping[str, tuple[object, ...]] = {
    "dims__tokens": (1, 2, 3),
    "dims__hidden": (8, 33, 64),
    "dims__experts": (1, 2, 3),
}


def test_every_legitimate_form_of_the_experts_is_within_the_bound_and_comes_near_it() -> None:
    drawn = problems(MoeExpertsProblems(), 150, 21, data=("normal", "outliers"), **SMALL)  # type: ignore[arg-type]
    found = survey(EXPERTS, drawn)
    assert max(found.values()) <= 1, found
    assert max(found.values()) >= 0.1, found


def test_every_legitimate_form_gives_the_exact_result_on_integers() -> None:
    drawn = problems(MoeExpertsProblems(), 120, 22, data=("integers", "cancelling"), **SMALL)  # type: ignore[arg-type]
    assert max(survey(EXPERTS, drawn).values()) == 0


@pytest.mark.parametrize("lower", [BF16.round, F16.round], ids=["bfloat16", "float16"])
def test_experts_accumulated_in_a_lower_class_are_beyond_the_bound_of_float32(lower: Round) -> None:
    axes = SMALL | {"dtype": ("float32",), "structure__quantised": (False,)}
    drawn = problems(MoeExpertsProblems(), 20, 23, data=("normal",), **axes)  # type: ignore[arg-type]
    assert survey({"lower": partial(emulated_experts, how="sequential", to=lower)}, drawn)["lower"] > 1


def test_operands_of_eleven_bits_are_seen_on_random_and_on_integer_data() -> None:
    axes = SMALL | {"dtype": ("float32",), "structure__quantised": (False,), "structure__expert_map": ("none",)}
    for data in ("normal", "integers"):
        drawn = problems(MoeExpertsProblems(), 20, 24, data=(data,), **axes)  # type: ignore[arg-type]
        assert survey({"lower": partial(emulated_experts, how="sequential", operands=tf32)}, drawn)["lower"] > 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("lower", LOWER)
def test_sixteen_bit_experts_with_a_lower_accumulator_are_seen_by_the_exact_tier(dtype: str, lower: str) -> None:
    """Their tolerance is that of the 16-bit intermediates, in which some such accumulators disappear."""
    axes = SMALL | {"dtype": (dtype,), "structure__quantised": (False,), "dims__hidden": (33, 64)}
    drawn = problems(MoeExpertsProblems(), 20, 25, data=("cancelling",), **axes)  # type: ignore[arg-type]
    assert survey({"lower": partial(emulated_experts, how=lower)}, drawn)["lower"] > 1


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
