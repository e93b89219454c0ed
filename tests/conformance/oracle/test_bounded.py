"""Bounds add up, random errors partly cancel, and what is not finite is compared for what it is."""

from __future__ import annotations

import numpy as np
import pytest

from polyaccel_conformance.compare import excess
from polyaccel_conformance.formats import FORMATS
from polyaccel_conformance.oracle.bounded import Bounded, cast, concatenate, deviations, finish
from polyaccel_conformance.oracle.gemm import linear
from polyaccel_conformance.oracle.lora import finish_touched
from polyaccel_conformance.oracle.primitives import add, matmul, scaled
from polyaccel_conformance.words import Source

BF16 = FORMATS["bfloat16"]


@pytest.mark.parametrize("rank", [1, 16, 512])
def test_roundings_of_a_long_h_stay_within_their_share_and_come_near_it(rank: int) -> None:
    source = Source(rank)
    h, b = source.normal("h", (64, rank)), source.normal("b", (rank, 64))
    exact = Bounded.exact(h)
    bound = matmul(cast(exact, BF16), Bounded.exact(b)).bound
    error = np.abs(BF16.round(h) @ b - h @ b)
    assert 0.1 <= (error / bound).max() <= 1


def test_structured_data_get_the_worst_case_of_a_long_h() -> None:
    source = Source(1)
    h, b = cast(Bounded.exact(source.normal("h", (64, 512))), BF16), Bounded.exact(source.normal("b", (512, 64)))
    random, worst = matmul(h, b).bound, matmul(h, b, "structured").bound
    assert np.all(worst >= random)
    # The sum of magnitudes over that of squares: of normal factors, sqrt(n) E|h b| / deviations with E|h b| = 2 / pi.
    assert np.median(worst / random) == pytest.approx(np.sqrt(512) * 2 / np.pi / deviations(64 * 64), rel=0.1)


def test_terms_sum_to_the_bound_through_every_rearrangement() -> None:
    source = Source(2)
    x, w = Bounded.exact(source.normal("x", (4, 9))), Bounded.exact(source.normal("w", (9, 6)))
    y = add(cast(matmul(x, w), BF16), Bounded.exact(source.normal("b", (6,))))
    found = concatenate([y.reshape(4, 6)[:, :2], scaled(y, np.full((4, 1), 3.0))[:, 2:]])
    np.testing.assert_allclose(sum(term for _, term in found.terms), found.bound, rtol=1e-12)
    assert found.noise is not None
    assert np.all(found.noise.bound <= found.bound)


def test_an_exact_order_has_no_bound() -> None:
    y = linear(np.full((2, 3), 2.0), np.full((4, 3), 3.0), np.ones(4), "exact")
    assert np.array_equal(y.value, np.full((2, 4), 19.0))
    assert not y.bound.any()


def test_an_untouched_element_keeps_its_bits() -> None:
    y = Bounded(np.array([1.0, 1.0]), np.array([0.5, 0.5]), (("error", np.array([0.5, 0.5])),))
    expected = finish_touched(y, np.array([True, False]), BF16)
    assert excess(expected, np.array([1.25, 1.0])).max() < 1
    assert excess(expected, np.array([1.0, 1.0078125]))[1] == np.inf


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_must_come_out_as_it_is(value: float) -> None:
    expected = finish(Bounded.exact(np.array([value])), BF16)
    assert excess(expected, np.array([value]))[0] == 0
    for other in {0.0, BF16.max, np.inf, -np.inf} - {value}:
        assert excess(expected, np.array([other]))[0] > 1
