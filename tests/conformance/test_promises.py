"""What was never promised: rules cover what they name and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest

from polyaccel_conformance.check import CaseResult, Failure
from polyaccel_conformance.grouping import failure_groups
from polyaccel_conformance.problems.registry import PROBLEM_SETS
from polyaccel_conformance.promises import Kernel, NotPromised, Rule, judged, mappings, rules, sources
from polyaccel_conformance.results import encode
from polyaccel_conformance.schedule import fixed

CASE = next(i.case for i in fixed(PROBLEM_SETS["gelu"]) if i.case.dtype == "float16")
RULE = Rule(operator="gelu", reason="rounds", checks=("values.*",), causes=("wrong *",), axes="dtype=*float16")
FAILURE = Failure(check="values.bound", cause="wrong value", message="", error=2.0, tolerance=1.0)


def result(*failures: Failure) -> CaseResult:
    return CaseResult(case=CASE, failures=failures, checks=(), implementation="", kind="native")


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"check": "memory.reads"}, {}),
        ({"cause": "crash: signal 11"}, {}),
        ({}, {"operator": "rms_norm"}),
        ({}, {"axes": "dtype=float32"}),
        ({}, {"at_most": 1.5}),
        ({"error": None}, {"at_most": 1.5}),
    ],
)
def test_a_rule_covers_only_the_operator_check_cause_axes_and_size_that_it_names(
    change: dict[str, object], rule: dict[str, object]
) -> None:
    assert RULE.covers(CASE, FAILURE)
    assert replace(RULE, at_most=2.0).covers(CASE, FAILURE)
    assert not replace(RULE, **rule).covers(CASE, replace(FAILURE, **change))  # type: ignore[arg-type]


def test_one_failure_that_is_not_covered_makes_the_case_wrong() -> None:
    other = replace(FAILURE, check="memory.reads")
    both = judged(result(FAILURE, other), (RULE,))
    assert [failure.not_promised for failure in both.failures] == ["rounds", ""]
    assert both.wrong
    assert not judged(result(FAILURE), (RULE,)).wrong
    assert not judged(result(FAILURE), (RULE,)).passed


def test_failures_of_one_cause_are_grouped_apart_by_whether_they_were_promised() -> None:
    groups, apart = failure_groups([judged(result(FAILURE), (RULE,)), result(FAILURE), result(FAILURE)])
    assert [group.cases for group in groups] == [2]
    assert [group.cases for group in apart] == [1]


def test_a_table_gives_its_rules_mappings_and_distributions() -> None:
    said = NotPromised(reason="rounds", checks=("values.*",), causes=("wrong *",), axes="dtype=*float16")
    kernel = Kernel(abs, mapping="abs(x)", distribution="acme 1.0", not_promised=(said,))
    table = {"gelu": kernel, "rms_norm": abs}
    assert rules(table) == (RULE,)
    assert mappings(table) == {"gelu": "abs(x)"}
    assert sources(table) == ("acme 1.0",)


def test_a_rule_survives_the_log() -> None:
    assert Rule.from_json(encode(RULE)) == RULE
