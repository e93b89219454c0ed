"""The bound of the activations holds for every legitimate implementation, and for no coarser one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from polyaccel_conformance.formats import FORMATS
from polyaccel_conformance.oracle.activation import CUBIC, gelu, silu_and_mul
from polyaccel_conformance.oracle.bounded import finish
from polyaccel_conformance.oracle.functions import erf_values
from polyaccel_conformance.problem import Problem
from polyaccel_conformance.problems.activation import GeluProblems, SiluAndMulProblems
from tests.conformance.drawn import Emulation, operand, problems, survey
from tests.conformance.emulation import BF16, F16, F32, f32, rounding

Floats = npt.NDArray[np.float64]
Round = Callable[[npt.ArrayLike], Floats]

GOLDENS = json.loads((Path(__file__).parents[1] / "goldens" / "activation.json").read_text())
COUNTS = [70, pytest.param(3400, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]


def _off(exact: Floats, ulps: int, step: Round = f32) -> Floats:
    """``exact`` rounded, or a float32 number up to ``ulps`` units in the last place away from it. Functions saturate:
    what rounds to one is one, and zero is zero."""
    if not ulps:
        return step(exact)
    away = exact + (ulps - np.sign(ulps) / 2) * F32.quantum(exact)
    limits = (exact == 0) | (np.abs(f32(exact)) == 1)
    return np.where(limits, f32(exact), f32(away))


def _quotient(a: Floats, b: Floats, ulps: int, step: Round) -> Floats:
    return np.where(b == 1, a, _off(a / b, ulps, step))


def emulated_silu(
    problem: Problem, form: str = "quotient", *, kept: bool = False, ulps: int = 0, step: Round = f32
) -> Mapping[str, Floats]:
    gate, up = np.split(operand(problem, "x"), 2, axis=-1)
    decay = _off(np.exp(-gate), 2 * ulps, step)
    if form == "quotient":
        y = _quotient(gate, step(1 + decay), ulps, step)
    elif form == "sigmoid":
        y = step(gate * _quotient(np.ones_like(gate), step(1 + decay), ulps, step))
    else:
        small = step(np.exp(-np.abs(gate)))
        y = step(gate * step(np.where(gate >= 0, 1.0, small) / step(1 + small)))
    if kept:
        y = rounding(FORMATS[problem.case.dtype])(y)
    return {"y": step(y * up)}


def emulated_gelu(problem: Problem, form: str = "plain", *, ulps: int = 0, step: Round = f32) -> Mapping[str, Floats]:
    x = operand(problem, "x")
    if problem.case.attributes["approximate"] == "none":
        z = step(x * f32(math.sqrt(0.5)))
        if form == "complement":
            tail = step(np.array([math.erfc(-v) for v in z.reshape(-1).tolist()]).reshape(z.shape))
            return {"y": step(step(0.5 * x) * tail)}
        inner = np.clip(_off(erf_values(z), ulps, step), -1, 1)
    else:
        if form == "factored":
            argument = step(step(x * f32(math.sqrt(2 / math.pi))) * step(1 + step(f32(CUBIC) * step(x * x))))
        else:
            cube = step(step(x * x) * x)
            argument = step(f32(math.sqrt(2 / math.pi)) * step(x + step(f32(CUBIC) * cube)))
        inner = np.clip(_off(np.tanh(argument), ulps, step), -1, 1)
    if form == "distributed":
        half = step(0.5 * x)
        return {"y": step(half + step(half * inner))}
    return {"y": step(step(0.5 * x) * step(1 + inner))}


SILU: Mapping[str, Emulation] = {
    **{form: partial(emulated_silu, form=form) for form in ("quotient", "sigmoid", "stable")},
    **{f"{form}, kept": partial(emulated_silu, form=form, kept=True) for form in ("quotient", "sigmoid", "stable")},
    "slowest exp and division allowed, high": partial(emulated_silu, ulps=1),
    "slowest exp and division allowed, low": partial(emulated_silu, form="sigmoid", ulps=-1, kept=True),
}
GELU: Mapping[str, Emulation] = {
    **{form: partial(emulated_gelu, form=form) for form in ("plain", "factored", "complement")},
    "4 ulp high": partial(emulated_gelu, ulps=4),
    "4 ulp low": partial(emulated_gelu, form="factored", ulps=-4),
}


@pytest.mark.parametrize(
    ("problem_set", "emulations"), [(SiluAndMulProblems(), SILU), (GeluProblems(), GELU)], ids=["silu_and_mul", "gelu"]
)
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("count", COUNTS)
def test_no_legitimate_implementation_is_over_and_the_worst_is_near(
    problem_set: SiluAndMulProblems | GeluProblems, emulations: Mapping[str, Emulation], dtype: str, count: int
) -> None:
    drawn = problems(problem_set, count, seed=21, dtype=(dtype,), dims__n=(1, 7, 64, 129), dims__tokens=(1, 2, 7))
    ratios = survey(emulations, drawn)
    assert {name: ratio for name, ratio in ratios.items() if ratio > 1} == {}
    assert max(ratios.values()) >= 0.1


@pytest.mark.parametrize(
    ("problem_set", "emulate"),
    [(SiluAndMulProblems(), emulated_silu), (GeluProblems(), emulated_gelu)],
    ids=["silu_and_mul", "gelu"],
)
@pytest.mark.parametrize(
    ("dtype", "step"),
    [("float32", F16.round), ("float32", BF16.round), ("bfloat16", BF16.round), ("float16", F16.round)],
)
def test_arithmetic_one_class_lower_is_over_on_random_data(
    problem_set: SiluAndMulProblems | GeluProblems,
    emulate: Callable[..., Mapping[str, Floats]],
    dtype: str,
    step: Round,
) -> None:
    drawn = problems(problem_set, 2, seed=2, dtype=(dtype,), data=("normal",), dims__n=(256,), dims__tokens=(16,))
    assert survey({"lower": partial(emulate, step=step)}, drawn)["lower"] > 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_truncating_store_of_16_bits_is_over_in_the_exact_tier(dtype: str) -> None:
    def truncating(problem: Problem) -> Mapping[str, Floats]:
        return {"y": FORMATS[dtype].truncate(emulated_silu(problem)["y"])}

    drawn = problems(SiluAndMulProblems(), 2, seed=2, dtype=(dtype,), data=("saturated",), dims__n=(64,))
    assert survey({"": truncating}, drawn)[""] > 1


def test_swapped_halves_are_over_in_the_exact_tier() -> None:
    def swapped(problem: Problem) -> Mapping[str, Floats]:
        up, gate = np.split(operand(problem, "x"), 2, axis=-1)
        return {"y": gate / (1 + np.exp(-gate)) * up}

    drawn = problems(SiluAndMulProblems(), 2, seed=2, dtype=("float32",), data=("saturated",), dims__tokens=(7,))
    assert survey({"": swapped}, drawn)[""] > 1


@pytest.mark.parametrize("dtype", FORMATS)
def test_infinity_is_required_beyond_the_largest_number(dtype: str) -> None:
    problem = next(
        problems(SiluAndMulProblems(), 1, 4, dtype=(dtype,), data=("overflow",), dims__n=(256,), dims__tokens=(7,))
    )
    value = problem.expected()["y"].value  # type: ignore[union-attr]
    largest = FORMATS[dtype].max
    assert (np.abs(value) > largest).any()
    assert (np.abs(value) < largest).any()
    right = emulated_silu(problem)
    assert survey({"": lambda _: right}, iter([problem]))[""] <= 1
    clamped = {"y": np.clip(right["y"], -largest, largest)}
    assert survey({"": lambda _: clamped}, iter([problem]))[""] > 1


@pytest.mark.parametrize("golden", GOLDENS, ids=lambda golden: golden["name"])
@pytest.mark.parametrize("dtype", FORMATS)
def test_published_and_hand_computed_results(golden: Mapping[str, object], dtype: str) -> None:
    out = FORMATS[dtype]
    x, wanted = (np.array(golden[name], dtype=np.float64) for name in ("x", "expected"))
    if golden["operator"] == "silu_and_mul":
        y = silu_and_mul(x, kept=out, exp_ulps=2, divide_ulps=1)
    else:
        y = gelu(x, "tanh" if golden["approximate"] == "tanh" else "none", erf_ulps=4, tanh_ulps=4)
    # The tables have fifteen decimals.
    np.testing.assert_allclose(y.value, wanted, rtol=1e-14, atol=3e-15)
    assert np.all(finish(y, out).tolerance >= np.abs(out.round(wanted) - wanted))
