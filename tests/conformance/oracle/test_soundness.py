"""No legitimate implementation of any operator is over the oracle's bound."""

from __future__ import annotations

import json

import pytest

from polyaccel.backend import OPERATORS, STATIONS
from polyaccel_conformance.formats import FORMATS
from tests.conformance.drawn import problem_set
from tests.conformance.oracle.subjects import SUBJECTS
from tests.conformance.oracle.survey import CASES, EACH, FIGURES, PAGE, rendered, soundness, stored

EXACT = {name for name, spec in OPERATORS.items() if spec.numerics.exact}
COUNTS = [200, pytest.param(CASES, marks=[pytest.mark.slow, pytest.mark.timeout(7200)])]
# In float32 the contract leaves the root, the exponential and the division their last places.
ULPS = {"rms_norm", "layer_norm", "row_parallel_add_norm", "moe_route"}


def test_every_numeric_operator_and_station_has_implementations() -> None:
    assert {*OPERATORS, *STATIONS} - EXACT == set(SUBJECTS)
    assert min(len(subject.legitimate) for subject in SUBJECTS.values()) >= EACH


@pytest.mark.parametrize("operator", SUBJECTS)
@pytest.mark.parametrize("cases", COUNTS)
def test_no_legitimate_implementation_is_over(operator: str, cases: int) -> None:
    found = soundness(SUBJECTS[operator], cases, seed=23)
    assert {name: row["worst"] for name, row in found.items() if row["worst"] > 1} == {}
    assert min(row["cases"] for row in found.values()) > 0


@pytest.mark.parametrize("operator", [name for name in SUBJECTS if name != "sample"])
@pytest.mark.parametrize("dtype", FORMATS)
def test_every_legitimate_implementation_agrees_bit_for_bit_on_exact_data(operator: str, dtype: str) -> None:
    subject = SUBJECTS[operator]
    kinds = {str(kind) for kind in (*subject.exact["data"], "integers")}
    exact = subject.drawn(6, 31, dtype=(dtype,), data=tuple(sorted(kinds & set(_kinds(operator)))))
    most = 1.0 if (operator in ULPS and dtype == "float32") or operator == "moe_route" else 0.0
    assert max(subject.worst(subject.legitimate, exact).values()) <= most


def _kinds(operator: str) -> list[str]:
    return [str(kind) for kind in problem_set(operator).axes()["data"]]


# -- the survey on the page --------------------------------------------------------------------------------------------


def test_the_survey_on_the_page_is_that_of_every_operator_with_nothing_over() -> None:
    figures = stored()
    assert set(figures) == set(SUBJECTS)
    for operator, found in figures.items():
        rows = found["soundness"]
        assert found["cases"] >= CASES, operator
        assert set(rows) == set(SUBJECTS[operator].legitimate), operator
        assert sum(row["cases"] for row in rows.values()) == EACH * found["cases"], operator
        assert not any(row["over"] for row in rows.values()), operator


def test_the_page_holds_the_tables_of_the_survey() -> None:
    page = PAGE.read_text()
    assert rendered(page, stored()) == page


def test_a_survey_file_is_repeated_by_its_seed() -> None:
    figures = json.loads((FIGURES / "rotary_embedding.json").read_text())
    again = soundness(SUBJECTS["rotary_embedding"], 8, figures["seed"])
    assert all(row["worst"] <= figures["soundness"][name]["worst"] for name, row in again.items())
