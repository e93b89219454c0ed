"""The bound of the rotary embedding holds for every legitimate implementation, and for no coarser one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pytest

from polyaccel_conformance.formats import FORMATS
from polyaccel_conformance.oracle.rotary import rotate
from polyaccel_conformance.problem import Problem
from polyaccel_conformance.problems.rotary import RotaryProblem, RotaryProblems
from tests.conformance.drawn import Emulation, operand, problems, survey
from tests.conformance.emulation import BF16, F16, f32

Floats = npt.NDArray[np.float64]
Round = Callable[[npt.ArrayLike], Floats]

GOLDENS = json.loads((Path(__file__).parents[1] / "goldens" / "rotary.json").read_text())
SMALL = {"dims__head_dim": (2, 7, 33, 64), "dims__tokens": (1, 2, 7)}


def emulated(problem: Problem, form: str = "products", step: Round = f32, table: Round = f32) -> Mapping[str, Floats]:
    assert isinstance(problem, RotaryProblem)
    cos, sin = (table(t.values.astype(np.float64)[problem.positions])[:, None] for t in (problem.cos, problem.sin))
    width, found = cos.shape[-1], {}
    for name in ("q", "k"):
        x = operand(problem, name).copy()
        if problem.style == "half":
            first, second = slice(0, width), slice(width, 2 * width)
        else:
            first, second = slice(0, 2 * width, 2), slice(1, 2 * width, 2)
        a, b = x[..., first].copy(), x[..., second].copy()
        if form == "products":
            x[..., first], x[..., second] = step(step(a * cos) - step(b * sin)), step(step(b * cos) + step(a * sin))
        elif form == "first product fused":
            x[..., first], x[..., second] = step(a * cos - step(b * sin)), step(b * cos + step(a * sin))
        elif form == "second product fused":
            x[..., first], x[..., second] = step(step(a * cos) - b * sin), step(step(b * cos) + a * sin)
        else:
            x[..., first], x[..., second] = step(a * cos - b * sin), step(b * cos + a * sin)
        found[name] = x
    return found


LEGITIMATE: Mapping[str, Emulation] = {
    form: partial(emulated, form=form) for form in ("products", "first product fused", "second product fused", "exact")
}


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("count", [70, pytest.param(3400, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_no_legitimate_implementation_is_over_and_the_worst_is_near(dtype: str, count: int) -> None:
    ratios = survey(LEGITIMATE, problems(RotaryProblems(), count, seed=31, dtype=(dtype,), **SMALL))
    assert {name: ratio for name, ratio in ratios.items() if ratio > 1} == {}
    assert max(ratios.values()) >= 0.1


@pytest.mark.parametrize(
    ("dtype", "step", "table"),
    [
        ("float32", F16.round, f32),
        ("float32", f32, F16.round),
        ("bfloat16", BF16.round, f32),
        ("bfloat16", f32, BF16.round),
        ("float16", F16.round, f32),
        ("float16", f32, F16.round),
    ],
)
def test_arithmetic_or_tables_one_class_lower_are_over_on_random_data(dtype: str, step: Round, table: Round) -> None:
    where = {"dims__head_dim": (128,), "dims__rotary_dim": (64,), "dims__tokens": (33,), "data": ("normal",)}
    lower = {"lower": partial(emulated, step=step, table=table)}
    assert survey(lower, problems(RotaryProblems(), 2, seed=1, dtype=(dtype,), **where))["lower"] > 1


@pytest.mark.parametrize("dtype", FORMATS)
def test_the_other_pairing_is_over_in_the_exact_tier(dtype: str) -> None:
    def other(problem: Problem) -> Mapping[str, Floats]:
        style = "half" if problem.case.attributes["style"] == "interleaved" else "interleaved"
        return emulated(RotaryProblems().problem(problem.case.with_(attributes__style=style)))

    where = {"dims__head_dim": (64,), "dims__rotary_dim": (16,), "dims__tokens": (3,), "data": ("permutation",)}
    for problem in problems(RotaryProblems(), 4, seed=1, dtype=(dtype,), **where):
        assert survey({"": other}, iter([problem]))[""] > 1


@pytest.mark.parametrize("golden", GOLDENS, ids=lambda golden: golden["name"])
def test_hand_computed_results(golden: Mapping[str, list[float]]) -> None:
    x, cos, sin, wanted = (np.array(golden[name]) for name in ("x", "cos", "sin", "expected"))
    style: Literal["half", "interleaved"] = "half" if golden["style"] == "half" else "interleaved"  # type: ignore[comparison-overlap]
    turned = rotate(x[None, None], cos[None], sin[None], style)
    np.testing.assert_allclose(turned.value[0, 0], wanted, rtol=1e-15, atol=1e-15)
    assert not turned.bound[0, 0, 2 * len(cos) :].any()
