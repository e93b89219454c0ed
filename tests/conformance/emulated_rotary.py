"""Implementations of the rotary embedding, emulated on the host operands of a problem."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import numpy.typing as npt

from polyaccel_conformance.problem import Problem
from polyaccel_conformance.problems.rotary import RotaryProblem
from tests.conformance.drawn import Emulation, operand
from tests.conformance.emulation import f32

Floats = npt.NDArray[np.float64]
Round = Callable[[npt.ArrayLike], Floats]


def turned(x: Floats, cos: Floats, sin: Floats, style: str, form: str = "products", step: Round = f32) -> Floats:
    """``x: [T, heads, head_dim]`` by ``cos, sin: [T, 1, width]``."""
    width, y = cos.shape[-1], x.copy()
    if style == "half":
        first, second = slice(0, width), slice(width, 2 * width)
    else:
        first, second = slice(0, 2 * width, 2), slice(1, 2 * width, 2)
    a, b = x[..., first], x[..., second]
    if form == "products":
        y[..., first], y[..., second] = step(step(a * cos) - step(b * sin)), step(step(b * cos) + step(a * sin))
    elif form == "first product fused":
        y[..., first], y[..., second] = step(a * cos - step(b * sin)), step(b * cos + step(a * sin))
    elif form == "second product fused":
        y[..., first], y[..., second] = step(step(a * cos) - b * sin), step(step(b * cos) + a * sin)
    else:
        y[..., first], y[..., second] = step(a * cos - b * sin), step(b * cos + a * sin)
    return y


def emulated(problem: Problem, form: str = "products", step: Round = f32, table: Round = f32) -> Mapping[str, Floats]:
    assert isinstance(problem, RotaryProblem)
    cos, sin = (table(t.values.astype(np.float64)[problem.positions])[:, None] for t in (problem.cos, problem.sin))
    return {name: turned(operand(problem, name), cos, sin, problem.style, form, step) for name in ("q", "k")}


LEGITIMATE: Mapping[str, Emulation] = {
    form: partial(emulated, form=form) for form in ("products", "first product fused", "second product fused", "exact")
}
