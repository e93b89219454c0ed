"""The rotary embedding's oracle gives hand-computed results; the other pairing is wrong in the exact tier."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pytest

from polyaccel_conformance.formats import FORMATS
from polyaccel_conformance.oracle.rotary import rotate
from polyaccel_conformance.problem import Problem
from polyaccel_conformance.problems.rotary import RotaryProblems
from tests.conformance.drawn import problems, survey
from tests.conformance.emulated_rotary import emulated

Floats = npt.NDArray[np.float64]

GOLDENS = json.loads((Path(__file__).parents[1] / "goldens" / "rotary.json").read_text())


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
