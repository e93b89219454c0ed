"""The ``-k`` expression."""

from __future__ import annotations

import pytest

from polyaccel_conformance.case import Case
from polyaccel_conformance.errors import UsageError
from polyaccel_conformance.selection import parse

CASE = Case.of("sgmv", {"dtype": "float16", "dims.k": 16, "layouts.x": "row_padded"}, 3)


@pytest.mark.parametrize(
    "expression",
    [
        "",
        "sgmv",
        "gmv",
        "float16 and padded",
        "dims.k=16",
        "not linear",
        "linear or sgmv",
        "not (linear or gelu)",
        "linear or not gelu and float16",
        "seed=3",
        f"key={CASE.key}",
    ],
)
def test_an_expression_selects(expression: str) -> None:
    assert parse(expression)(CASE)


@pytest.mark.parametrize("expression", ["linear", "dims.k=1", "k=16", "sgmv and bfloat16", "not sgmv", "seed=30"])
def test_an_expression_leaves_out(expression: str) -> None:
    assert not parse(expression)(CASE)


@pytest.mark.parametrize("expression", ["and", "a and", "(a", "a b", "not", "a or or b", ")", "(a b)"])
def test_a_malformed_expression_is_a_usage_error(expression: str) -> None:
    with pytest.raises(UsageError, match="-k"):
        parse(expression)
