"""Every numeric operator is asked in all three tiers, every discrete one for equality."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from polyaccel.backend import OPERATORS, STATIONS
from polyaccel_conformance.case import Case, Choice
from polyaccel_conformance.checks.registry import CHECKS
from polyaccel_conformance.multi.registry import in_lockstep
from polyaccel_conformance.oracle.bounded import Expected
from polyaccel_conformance.probes.registry import PROBES, RANKED_PROBES
from polyaccel_conformance.problem import Exactly, Problem
from polyaccel_conformance.problems.registry import PROBLEM_SETS
from tests.conformance.drawn import problem_set
from tests.conformance.oracle.subjects import SUBJECTS

SPECS = {**OPERATORS, **STATIONS}
DISCRETE = sorted(name for name, spec in SPECS.items() if spec.numerics.exact)
NUMERIC = sorted(set(SPECS) - set(DISCRETE))
TIERS = {1: "values.exact", 2: "values.bound", 3: "numerics.measured"}
# A lookup alone is exact whatever the data.
USED: dict[str, Choice] = {"structure.segments": "one"}
# Nothing comes out of it.
SILENT = {"barrier"}


def of_every_kind(operator: str, **more: Choice) -> Iterator[Problem]:
    """One problem of each kind of data, all other axes at their first value."""
    found = problem_set(operator)
    axes = {path: values[0] for path, values in found.axes().items()}
    if operator not in PROBLEM_SETS:
        axes["ranks"] = 2
    kinds: Sequence[Choice] = found.axes().get("data", ("normal",))
    longer: dict[str, Choice] = {"dims.k": 16} if "dims.k" in axes else {}
    for kind in kinds:
        for dtype in ("float32", "bfloat16"):
            mended = found.mend({**axes, **longer, **more, "data": kind, "dtype": dtype})
            assert mended is not None
            yield found.problem(Case.of(operator, mended, 1))


@pytest.mark.parametrize("operator", NUMERIC)
def test_a_numeric_operator_is_asked_in_all_three_tiers(operator: str) -> None:
    asked = {
        tier
        for problem in of_every_kind(operator, **(USED if operator == "embedding" else {}))
        for tier, check in TIERS.items()
        if CHECKS[check].applies(problem.case, problem)
    }
    assert asked == {1, 2, 3}
    assert {CHECKS[check].tier for check in TIERS.values()} == asked


@pytest.mark.parametrize("operator", [name for name in DISCRETE if name not in SILENT])
def test_a_discrete_operator_is_compared_for_equality_whatever_the_data(operator: str) -> None:
    for problem in of_every_kind(operator):
        expected = problem.expected()
        assert expected
        for name, wanted in expected.items():
            assert isinstance(wanted, Exactly) or (isinstance(wanted, Expected) and wanted.exact), (name, problem.case)
        assert CHECKS["values.exact"].applies(problem.case, problem)


def test_every_numeric_operator_has_a_probe_and_implementations() -> None:
    assert {*PROBES, *RANKED_PROBES} == set(NUMERIC) == set(SUBJECTS)


def test_the_tiers_of_ranks_are_asked_in_lockstep() -> None:
    assert in_lockstep(TIERS.values()) == tuple(TIERS.values())
