"""The bound of the norms holds for every legitimate implementation, and for no coarser one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from polyaccel_conformance.formats import FORMATS
from polyaccel_conformance.oracle.bounded import Bounded, finish
from polyaccel_conformance.oracle.norm import layer_norm, residual_sum, rms_norm
from polyaccel_conformance.problem import Problem
from polyaccel_conformance.problems.norm import LayerNormProblems, RmsNormProblems
from tests.conformance.drawn import Emulation, operand, problems, survey
from tests.conformance.emulation import BF16, F16, LEGITIMATE, f32, rounding, sum_terms

Floats = npt.NDArray[np.float64]
Round = Callable[[npt.ArrayLike], Floats]

SIZES = (1, 2, 7, 16, 17, 33, 64, 129, 256)
GOLDENS = json.loads((Path(__file__).parents[1] / "goldens" / "norm.json").read_text())
RANDOM = ("normal", "wide", "outliers", "nonfinite", "overflow")


def _sum(x: Floats, how: str) -> Floats:
    flat = x.reshape(-1, x.shape[-1])
    return sum_terms(flat, how).reshape(*x.shape[:-1], 1)


def emulated_rms_norm(
    problem: Problem,
    how: str,
    *,
    kept: bool = False,
    unrounded_sum: bool = False,
    ulps: int = 0,
    statistics: Round = f32,
    norm: bool = False,
) -> Mapping[str, Floats]:
    to = rounding(FORMATS[problem.case.dtype])
    x, weight = operand(problem, "x"), operand(problem, "weight")
    eps, found = float(problem.case.attributes["eps"]), {}
    s = x
    if "residual" in problem.operands:
        total = f32(x + operand(problem, "residual"))
        found["s"] = to(total)
        s = total if unrounded_sum else found["s"]
    summed = statistics(_sum(s * s, how))
    if norm:
        length = f32(np.sqrt(summed))
        mean = f32(f32(length * length) * f32(1 / x.shape[-1]))
    else:
        mean = statistics(summed * f32(1 / x.shape[-1]))
    rstd = statistics(1 / np.sqrt(statistics(mean + f32(eps))))
    rstd = rstd + ulps * 2.0**-23 * np.exp2(np.floor(np.log2(rstd)))
    normed = f32(s * f32(rstd))
    return {"normed": f32((to(normed) if kept else normed) * weight), **found}


def emulated_layer_norm(
    problem: Problem, how: str, form: str = "two passes", statistics: Round = f32
) -> Mapping[str, Floats]:
    x, weight = operand(problem, "x"), operand(problem, "weight")
    bias = operand(problem, "bias") if "bias" in problem.operands else 0.0
    n, eps = x.shape[-1], f32(float(problem.case.attributes["eps"]))
    reciprocal = f32(1 / n)
    if form == "running":
        mean, squares = np.zeros((*x.shape[:-1], 1)), np.zeros((*x.shape[:-1], 1))
        for i in range(n):
            delta = f32(x[..., i : i + 1] - mean)
            mean = f32(mean + f32(delta / (i + 1)))
            squares = f32(squares + f32(delta * f32(x[..., i : i + 1] - mean)))
        variance = f32(squares * reciprocal)
    else:
        mean = statistics(_sum(x, how) * reciprocal)
        if form == "one pass":
            variance = f32(f32(_sum(x * x, how) * reciprocal) - f32(mean * mean))
        else:
            centred = statistics(x - mean)
            variance = statistics(_sum(centred * centred, how) * reciprocal)
    rstd = statistics(1 / np.sqrt(statistics(variance + eps)))
    normed = f32(f32(x * rstd) + f32(-f32(mean * rstd))) if form == "distributed" else f32(f32(x - mean) * rstd)
    return {"y": f32(f32(normed * weight) + bias)}


RMS_LEGITIMATE: Mapping[str, Emulation] = {
    **{how: partial(emulated_rms_norm, how=how) for how in LEGITIMATE},
    **{f"{how}, normed kept in x's dtype": partial(emulated_rms_norm, how=how, kept=True) for how in LEGITIMATE},
    "statistics of the unrounded sum": partial(emulated_rms_norm, how="pairwise", unrounded_sum=True, kept=True),
    "rsqrt 2 ulp high": partial(emulated_rms_norm, how="chunk16 truncating", ulps=2),
    "rsqrt 2 ulp low": partial(emulated_rms_norm, how="sequential", ulps=-2, kept=True),
    "by the Euclidean norm": partial(emulated_rms_norm, how="sequential", norm=True),
}
LAYER_LEGITIMATE: Mapping[str, Emulation] = {
    **{how: partial(emulated_layer_norm, how=how) for how in LEGITIMATE},
    "running mean": partial(emulated_layer_norm, how="", form="running"),
    "distributed": partial(emulated_layer_norm, how="pairwise", form="distributed"),
}


@pytest.mark.parametrize(
    ("problem_set", "emulations"),
    [(RmsNormProblems(), RMS_LEGITIMATE), (LayerNormProblems(), LAYER_LEGITIMATE)],
    ids=["rms_norm", "layer_norm"],
)
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("count", [70, pytest.param(3400, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_no_legitimate_implementation_is_over_and_the_worst_is_near(
    problem_set: RmsNormProblems | LayerNormProblems, emulations: Mapping[str, Emulation], dtype: str, count: int
) -> None:
    drawn = problems(problem_set, count, seed=11, dtype=(dtype,), dims__hidden=SIZES, dims__tokens=(1, 2, 7))
    ratios = survey(emulations, drawn)
    assert {name: ratio for name, ratio in ratios.items() if ratio > 1} == {}
    assert max(ratios.values()) >= 0.1


@pytest.mark.parametrize(
    ("problem_set", "emulate"),
    [(RmsNormProblems(), emulated_rms_norm), (LayerNormProblems(), emulated_layer_norm)],
    ids=["rms_norm", "layer_norm"],
)
@pytest.mark.parametrize(
    ("dtype", "statistics", "hidden"),
    [
        ("float32", BF16.round, 64),
        ("float32", F16.round, 64),
        ("bfloat16", BF16.round, 256),
        ("float16", F16.round, 256),
    ],
)
def test_statistics_one_class_lower_are_over_on_random_data(
    problem_set: RmsNormProblems | LayerNormProblems,
    emulate: Callable[..., Mapping[str, Floats]],
    dtype: str,
    statistics: Round,
    hidden: int,
) -> None:
    how = {BF16.round: "bfloat16 accumulator", F16.round: "float16 accumulator"}[statistics]
    lower = {"lower": partial(emulate, how=how, statistics=statistics)}
    drawn = problems(
        problem_set, 4, seed=5, dtype=(dtype,), dims__hidden=(hidden,), dims__tokens=(33,), data=("normal",)
    )
    assert survey(lower, drawn)["lower"] > 1


def test_float16_statistics_of_bfloat16_rows_are_over_in_the_exact_tier() -> None:
    lower = {"lower": partial(emulated_rms_norm, how="float16 accumulator", statistics=F16.round)}
    where = {"dtype": ("bfloat16",), "dims__hidden": (1023,), "dims__tokens": (7,), "structure__residual": (False,)}
    assert survey(lower, problems(RmsNormProblems(), 2, seed=5, data=("integers",), **where))["lower"] > 1


def test_a_truncating_store_of_16_bits_is_over_in_the_exact_tier() -> None:
    def truncating(problem: Problem) -> Mapping[str, Floats]:
        return {"normed": BF16.truncate(emulated_rms_norm(problem, "pairwise")["normed"])}

    where = {"dtype": ("bfloat16",), "dims__tokens": (7,), "dims__hidden": (64,), "structure__residual": (False,)}
    assert survey({"": truncating}, problems(RmsNormProblems(), 2, seed=5, data=("integers",), **where))[""] > 1


def test_the_variance_as_a_difference_of_squares_is_over_where_the_mean_is_large() -> None:
    lower = {"one pass": partial(emulated_layer_norm, how="pairwise", form="one pass")}
    drawn = problems(LayerNormProblems(), 4, seed=3, dtype=("float32",), data=("shifted",), dims__hidden=(64,))
    assert survey(lower, drawn)["one pass"] > 1


@pytest.mark.parametrize("golden", GOLDENS, ids=lambda golden: golden["name"])
@pytest.mark.parametrize("dtype", FORMATS)
def test_published_and_hand_computed_results(golden: Mapping[str, object], dtype: str) -> None:
    out = FORMATS[dtype]
    x, weight, wanted = (np.array(golden[name], dtype=np.float64) for name in ("x", "weight", "expected"))
    eps = float(golden["eps"])  # type: ignore[arg-type]
    if golden["operator"] == "rms_norm":
        s = Bounded.exact(x)
        if "residual" in golden:
            s = residual_sum(x, np.array(golden["residual"], dtype=np.float64), out)[1]
        y = rms_norm(s, weight, eps, normed=out, rsqrt_ulps=2)
    else:
        bias = np.array(golden["bias"], dtype=np.float64) if "bias" in golden else None
        y = layer_norm(x, weight, bias, eps, rsqrt_ulps=2)
    np.testing.assert_allclose(y.value, wanted, rtol=1e-14, atol=1e-15)
    assert np.all(finish(y, out).tolerance >= np.abs(out.round(wanted) - wanted))


@pytest.mark.parametrize(("low", "high"), [("float32", "float16"), ("float16", "bfloat16")])
def test_the_bound_grows_with_the_format_that_may_be_kept(low: str, high: str) -> None:
    s, weight = Bounded.exact(np.linspace(-2, 2, 16)[None]), np.ones(16)
    fine, coarse = (rms_norm(s, weight, 1e-5, normed=FORMATS[f], rsqrt_ulps=2).bound for f in (low, high))
    assert np.all(fine < coarse)
