"""What the activations' oracle gives at the ends, beyond them and in published tables."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from polyaccel_conformance.formats import FORMATS
from polyaccel_conformance.oracle.activation import gelu, silu_and_mul
from polyaccel_conformance.oracle.bounded import finish
from polyaccel_conformance.problem import Problem
from polyaccel_conformance.problems.activation import SiluAndMulProblems
from tests.conformance.drawn import operand, problems, survey
from tests.conformance.emulated_activation import emulated_silu

Floats = npt.NDArray[np.float64]

GOLDENS = json.loads((Path(__file__).parents[1] / "goldens" / "activation.json").read_text())


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
