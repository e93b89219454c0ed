"""Implementations of the norms, emulated on the host operands of a problem."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import numpy.typing as npt

from polyaccel_conformance.formats import FORMATS
from polyaccel_conformance.problem import Problem
from tests.conformance.drawn import Emulation, operand
from tests.conformance.emulation import LEGITIMATE, f32, rounding, sum_terms

Floats = npt.NDArray[np.float64]
Round = Callable[[npt.ArrayLike], Floats]


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
