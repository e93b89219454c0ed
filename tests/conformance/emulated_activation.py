"""Implementations of the activations, emulated on the host operands of a problem."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import numpy.typing as npt

from polyaccel_conformance.formats import FORMATS
from polyaccel_conformance.oracle.activation import CUBIC
from polyaccel_conformance.oracle.functions import erf_values
from polyaccel_conformance.problem import Problem
from tests.conformance.drawn import Emulation, operand
from tests.conformance.emulation import F32, f32, rounding

Floats = npt.NDArray[np.float64]
Round = Callable[[npt.ArrayLike], Floats]


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
