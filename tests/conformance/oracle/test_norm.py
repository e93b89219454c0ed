"""The norms' oracle gives published results; forms that lose bits of the statistics are over its bound."""

from __future__ import annotations

import json
from collections.abc import Mapping
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
from tests.conformance.drawn import problems, survey
from tests.conformance.emulated_norm import emulated_layer_norm, emulated_rms_norm
from tests.conformance.emulation import BF16

Floats = npt.NDArray[np.float64]

GOLDENS = json.loads((Path(__file__).parents[1] / "goldens" / "norm.json").read_text())


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
