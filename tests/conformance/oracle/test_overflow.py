"""Infinities: required beyond the rounding boundary, wrong below it, either right within the bound of it."""

from __future__ import annotations

import numpy as np
import pytest

from polyaccel_conformance.compare import compare, excess
from polyaccel_conformance.formats import FORMATS
from polyaccel_conformance.oracle.bounded import Bounded, Expected, finish
from polyaccel_conformance.problems.registry import PROBLEM_SETS
from tests.conformance.drawn import remembered
from tests.conformance.oracle.subjects import SUBJECTS

OVERFLOWING = [name for name in SUBJECTS if name in PROBLEM_SETS and "overflow" in PROBLEM_SETS[name].axes()["data"]]


def verdicts(dtype: str, value: float, bound: float = 0.0) -> dict[str, bool]:
    """Which results are accepted for a value known up to a bound."""
    out = FORMATS[dtype]
    expected = finish(Bounded(np.array([value]), np.array([bound])), out)
    sign = np.copysign(1.0, value)
    candidates = {"infinite": sign * np.inf, "largest": sign * out.max, "other infinity": -sign * np.inf, "nan": np.nan}
    return {name: bool(excess(expected, np.array([got]))[0] <= 1) for name, got in candidates.items()}


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("sign", [1, -1])
def test_beyond_the_boundary_only_infinity_is_right(dtype: str, sign: int) -> None:
    out = FORMATS[dtype]
    # A rounding and its safety are part of every tolerance.
    far = sign * out.overflow * (1 + 4 * out.unit)
    only = {"infinite": True, "largest": False, "other infinity": False, "nan": False}
    assert verdicts(dtype, far) == only
    assert verdicts(dtype, far * 2, bound=out.max / 4) == only


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("sign", [1, -1])
def test_below_the_boundary_infinity_is_wrong(dtype: str, sign: int) -> None:
    out = FORMATS[dtype]
    finite = {"infinite": False, "largest": True, "other infinity": False, "nan": False}
    assert verdicts(dtype, sign * out.max * (1 - out.unit)) == finite
    assert not verdicts(dtype, sign * out.max / 2, bound=out.max / 8)["infinite"]


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("side", [-1, 1])
def test_within_the_bound_of_the_boundary_either_is_right(dtype: str, sign: int, side: int) -> None:
    out = FORMATS[dtype]
    near = sign * out.overflow * (1 + side * out.unit / 8)
    either = {"infinite": True, "largest": True, "other infinity": False, "nan": False}
    assert verdicts(dtype, near) == either
    wide = verdicts(dtype, sign * out.overflow * (1 + side / 16), bound=out.max / 8)
    assert wide == either


@pytest.mark.parametrize("dtype", FORMATS)
def test_of_exact_data_the_rounded_value_decides(dtype: str) -> None:
    out = FORMATS[dtype]
    expected = finish(Bounded.exact([out.max, out.overflow, 2 * out.max]), out, exact=True)
    assert excess(expected, np.array([out.max, np.inf, np.inf])).tolist() == [0, 0, 0]
    assert excess(expected, np.array([np.inf, out.max, out.max])).tolist() == [np.inf] * 3


@pytest.mark.parametrize("dtype", FORMATS)
def test_a_missing_infinity_is_reported_with_both_values(dtype: str) -> None:
    out = FORMATS[dtype]
    found = compare(finish(Bounded.exact([4 * out.max]), out), np.array([out.max]), out.torch)
    assert found is not None
    assert (found.got, found.expected) == (out.max, 4 * out.max)


@pytest.mark.parametrize("operator", OVERFLOWING)
@pytest.mark.parametrize("dtype", FORMATS)
def test_healthy_overflow_is_right_and_clamping_is_not(operator: str, dtype: str) -> None:
    subject = SUBJECTS[operator]
    wide = {"dims__tokens": (16,), "dims__n": (65,), "dims__k": (33,), "dims__hidden": (65,), "dims__rank": (8,)}
    one = {"structure__segments": ("one",), "structure__ranks": ("equal",)}
    out, emulate = FORMATS[dtype], next(iter(subject.legitimate.values()))
    required, finite, clamped = 0, 0, 0
    for problem in map(remembered, subject.drawn(4, 3, **wide, **one, dtype=(dtype,), data=("overflow",))):
        with np.errstate(all="ignore"):
            outputs = emulate(problem)
            for name, expected in problem.expected().items():
                if not isinstance(expected, Expected):
                    continue
                got = out.round(outputs[name])
                assert excess(expected, got).max() <= 1
                beyond = np.abs(expected.value) - expected.tolerance >= out.overflow
                required += int(beyond.sum())
                finite += int((np.abs(expected.value) + expected.tolerance < out.overflow).sum())
                clamped += int((excess(expected, np.clip(got, -out.max, out.max)) > 1).sum())
    assert required > 0
    assert finite > 0
    # Where either is right, the largest number may still be too far from the value.
    assert clamped >= required


def test_every_product_and_row_operator_that_can_overflow_does() -> None:
    assert {"linear", "sgmv", "rms_norm", "layer_norm", "silu_and_mul"} <= set(OVERFLOWING)
