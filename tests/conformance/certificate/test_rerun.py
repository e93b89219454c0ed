"""Executing a sample again: spread over operators and ranks; a crash is a difference, never the end of verifying."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from polyaccel_conformance.case import Case
from polyaccel_conformance.certificate.condense import INPUTS, condensed
from polyaccel_conformance.certificate.rerun import rerun, sample
from polyaccel_conformance.check import CaseResult
from polyaccel_conformance.errors import UsageError
from polyaccel_conformance.log import Logged, parse_log, read_log
from polyaccel_conformance.problems.registry import PROBLEM_SETS
from polyaccel_conformance.results import RunHeader
from polyaccel_conformance.schedule import fixed
from polyaccel_conformance.subject import Subject

TABLES = Path(__file__).parents[1] / "runner" / "tables.py"


def passed(case: Case) -> CaseResult:
    return CaseResult(case=case, failures=(), checks=("values.exact", "values.bound"), implementation="", kind="native")


def of_table(name: str, cases: list[CaseResult]) -> Logged:
    subject = Subject(kind="table", name=name, path=str(TABLES))
    header = RunHeader(subject=subject, profile="quick", seed=0, checks=("values.exact",), operators=("layer_norm",))
    return Logged(header=header, results=tuple(("covering", c) for c in cases), controls={}, ended=True)


def test_a_sample_is_spread_over_operators_and_ranks_and_is_always_the_same() -> None:
    results = [
        passed(Case.of(operator, {"dims.tokens": n, "ranks": ranks}))
        for operator, ranks, count in (("linear", 1, 100), ("sgmv", 1, 3), ("sgmv", 2, 50))
        for n in range(count)
    ]
    chosen = sample(results, 12)
    found = [(r.case.operator, r.case.ranks) for r in chosen]
    assert {pair: found.count(pair) for pair in found} == {("linear", 1): 5, ("sgmv", 1): 3, ("sgmv", 2): 4}
    assert sample(results[::-1], 12) == chosen
    assert len({r.case.key for r in chosen}) == 12
    assert len(sample(results, 1000)) == len(results)


def test_a_case_that_crashes_here_is_a_difference() -> None:
    cases = [item.case for item in fixed(PROBLEM_SETS["layer_norm"])]
    dies = next(c for c in cases if c.dims["hidden"] == 1 and c.structure["bias"])
    lives = next(c for c in cases if c.dims["hidden"] == 2 and c.data == "integers")
    results = [passed(dies), passed(lives)]
    found = rerun(of_table("DIES", results), results, 3)
    assert found.done == 2
    (difference,) = found.differences
    assert dies.key in difference
    assert "signal 11" in difference
    assert found.left == ("the log has 2 cases, 3 were asked for",)


def test_a_backend_that_is_not_here_is_a_usage_error() -> None:
    results = [passed(Case.of("linear", {"dims.tokens": 1}))]
    logged = of_table("RIGHT", results)
    with pytest.raises(UsageError, match="no backend 'nosuch'"):
        rerun(replace(logged, header=replace(logged.header, subject=Subject(name="nosuch"))), results, 1)


def test_a_condensed_log_says_the_same_in_less_and_condensing_again_changes_nothing(log: Path) -> None:
    data = log.read_bytes()
    small = condensed(data)
    assert condensed(small) == small
    assert len(small) < len(data)
    before, after = read_log(log), parse_log(small, "small")
    assert after.header == before.header
    assert [r.case for _, r in after.results] == [r.case for _, r in before.results]
    assert [(r.passed, r.observed) for _, r in after.results] == [(r.passed, r.observed) for _, r in before.results]
    assert all(set(r.digests) == {INPUTS} for _, r in after.results if r.digests)


def test_a_condensed_log_names_no_folder(log: Path) -> None:
    line = {"type": "failure", "path": "/somewhere/else/cases/linear.json"}
    (found,) = condensed(log.read_bytes() + json.dumps(line).encode() + b"\n").splitlines()[-1:]
    assert json.loads(found)["path"] == "linear.json"
