"""Attention's oracle gives hand-computed results; its bound is made of named terms."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from polyaccel_conformance.formats import FORMATS
from polyaccel_conformance.oracle.attention import attention
from polyaccel_conformance.oracle.bounded import finish
from polyaccel_conformance.problems.attention import DenseAttentionProblems
from tests.conformance.drawn import problems
from tests.conformance.emulation import F32

GOLDENS = json.loads((Path(__file__).parents[1] / "goldens" / "attention.json").read_text())
SMALL = {
    "dims__tokens": (1, 2, 16, 17, 33),
    "dims__kv_heads": (1, 2),
    "dims__group": (1, 2),
    "dims__head_dim": (11, 33, 64),
}


@pytest.mark.parametrize("golden", GOLDENS, ids=lambda golden: golden["name"])
@pytest.mark.parametrize("dtype", FORMATS)
def test_hand_computed_results(golden: Mapping[str, list[list[float]]], dtype: str) -> None:
    q, k, v, wanted = (np.array(golden[name])[:, None] for name in ("q", "k", "v", "expected"))
    visible = np.array(golden["visible"], dtype=np.bool_)
    scale = float(golden["scale"])  # type: ignore[arg-type]
    out = attention(q, k, v, visible, scale, p_format=FORMATS[dtype], exp_ulps=2, divide_ulps=1)
    np.testing.assert_allclose(out.value, wanted, rtol=1e-14, atol=1e-15)
    assert np.all(finish(out, FORMATS[dtype]).tolerance >= np.abs(FORMATS[dtype].round(wanted) - wanted))


def test_query_heads_share_key_heads_in_order() -> None:
    v = np.array([[[1.0], [2.0]]])
    out = attention(
        np.ones((1, 6, 1)),
        np.ones((1, 2, 1)),
        v,
        np.ones((1, 1), dtype=np.bool_),
        1.0,
        p_format=F32,
        exp_ulps=2,
        divide_ulps=1,
    )
    assert out.value[0, :, 0].tolist() == [1, 1, 1, 2, 2, 2]


def test_the_terms_sum_to_the_bound() -> None:
    problem = next(problems(DenseAttentionProblems(), 1, seed=3, dtype=("bfloat16",), data=("normal",), **SMALL))
    expected = problem.expected()["out"]
    total = sum(np.broadcast_to(term, expected.tolerance.shape) for _, term in expected.terms)  # type: ignore[union-attr]
    np.testing.assert_allclose(expected.tolerance, total, rtol=0.02)  # type: ignore[union-attr]
