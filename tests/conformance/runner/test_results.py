"""Results survive JSON, logs are read as far as they were written, and verdicts follow from counts."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from polyaccel_conformance.case import Case
from polyaccel_conformance.cells import bucket, cells_of, count_cells
from polyaccel_conformance.check import CaseResult, Failure
from polyaccel_conformance.errors import ExitCode, UsageError
from polyaccel_conformance.log import ResultsLog, read_log
from polyaccel_conformance.results import (
    CellKey,
    CheckState,
    FailureGroup,
    OperatorState,
    RunHeader,
    RunResult,
    encode,
    result_from_json,
)
from polyaccel_conformance.subject import Subject
from polyaccel_conformance.tally import Tally

CASE = Case.of("linear", {"dtype": "float16", "dims.k": 17, "dims.n": 1, "layouts.x": "offset", "data": "normal"}, 9)
FAILURE = Failure(
    check="values.bound",
    cause="not a number",
    message="x",
    output="y",
    index=(0, 3),
    got=math.nan,
    expected=-math.inf,
    error=1.5,
    tolerance=None,
)
RESULT = CaseResult(
    case=CASE,
    failures=(FAILURE,),
    checks=("values.exact", "values.bound"),
    implementation="cpu.linear",
    kind="native",
    headroom={"y": math.inf},
    digests={"x": "0a"},
    observed="1b",
    seconds=0.5,
    notes=("11 bits",),
)
HEADER = RunHeader(
    subject=Subject(name="cpu"), profile="quick", seed=4, checks=("values.exact",), operators=("linear",)
)
OPERATOR = OperatorState(operator="linear", cases=1, planned=1)


def test_a_run_result_survives_json() -> None:
    group = FailureGroup(
        operator="linear",
        check="values.bound",
        cause="not a number",
        cases=2,
        failure=FAILURE,
        result=RESULT,
        original=CASE.with_seed(1),
    )
    before = RunResult(
        header=HEADER,
        operators=(OPERATOR,),
        checks=(CheckState(check="values.exact", verdict="passed", cases=1),),
        cells=count_cells([RESULT]),
        failures=(group,),
        incomplete="why",
    )
    text = json.dumps(before.to_json(), allow_nan=False)
    after = RunResult.from_json(json.loads(text))
    assert json.dumps(after.to_json()) == text
    assert replace(after, failures=()) == replace(before, failures=(), cells=after.cells)
    assert math.isnan(after.failures[0].failure.got or 0.0)
    with pytest.raises(ValueError, match="not a run result"):
        RunResult.from_json({"header": {}})


def test_a_case_result_survives_json() -> None:
    before = replace(RESULT, failures=())
    assert result_from_json(json.loads(json.dumps(encode(before), allow_nan=False))) == before


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({}, ExitCode.PASS),
        ({"checks": (CheckState(check="c", verdict="not exercised"),)}, ExitCode.PASS),
        ({"checks": (CheckState(check="c", verdict="inconclusive"),)}, ExitCode.INCONCLUSIVE),
        ({"incomplete": "interrupted"}, ExitCode.INCONCLUSIVE),
        ({"operators": ()}, ExitCode.INCONCLUSIVE),
        ({"empty_cells": ("L1: linear",)}, ExitCode.FAIL),
        ({"checks": (CheckState(check="c", verdict="failed"),), "incomplete": "x"}, ExitCode.FAIL),
        ({"device_lost": "gone", "checks": (CheckState(check="c", verdict="failed"),)}, ExitCode.DEVICE_LOST),
    ],
)
def test_the_exit_code_is_the_worst_of_what_was_found(changes: dict[str, object], code: ExitCode) -> None:
    result = RunResult(header=HEADER, operators=(OPERATOR,), checks=(), cells=(), failures=())
    assert replace(result, **changes).exit_code is code  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("control", "cases", "failures", "verdict"),
    [
        ("failed as it must", 3, 0, "passed"),
        ("failed as it must", 3, 1, "failed"),
        ("did not fail", 3, 1, "failed"),
        ("did not fail", 3, 0, "inconclusive"),
        ("did not end: hang", 3, 0, "inconclusive"),
        ("", 3, 0, "inconclusive"),
        ("impossible here: one device", 3, 0, "not exercised"),
        ("failed as it must", 0, 0, "not exercised"),
    ],
)
def test_a_check_passes_only_where_its_control_failed(control: str, cases: int, failures: int, verdict: str) -> None:
    tally = Tally(controls={"values.exact": control} if control else {})
    for number in range(cases):
        failure = Failure(check="values.exact", cause="c", message="m")
        tally.add(replace(RESULT, failures=(failure,) if number < failures else (), checks=("values.exact",)))
    (state,) = tally.check_states(["values.exact"])
    assert state.verdict == verdict
    assert bool(state.reason) == (verdict in ("inconclusive", "not exercised"))


def test_a_failure_under_no_checks_name_is_a_state_of_its_own() -> None:
    tally = Tally()
    tally.add(replace(RESULT, failures=(Failure(check="worker", cause="hang", message=""),), checks=()))
    assert [(s.check, s.verdict) for s in tally.check_states([])] == [("worker", "failed")]


@pytest.mark.parametrize(
    ("size", "name"), [(0, "0"), (1, "1"), (2, "2..15"), (15, "2..15"), (16, "16..127"), (16384, "16384..")]
)
def test_sizes_fall_into_ranges(size: int, name: str) -> None:
    assert bucket(size) == name


def test_a_case_counts_in_each_combination_of_layout_and_size() -> None:
    assert set(cells_of(CASE)) == {
        CellKey(operator="linear", dtype="float16", layout="x=offset", range="k=16..127"),
        CellKey(operator="linear", dtype="float16", layout="x=offset", range="n=1"),
    }
    (first, _) = count_cells([RESULT, replace(RESULT, failures=(), kind="composite")])
    assert (first.cases, first.failed, dict(first.kinds)) == (2, 1, {"native": 1, "composite": 1})


def test_a_log_is_read_as_far_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    with ResultsLog(path) as log:
        log.header(HEADER)
        log.case("covering", replace(RESULT, failures=()))
        log.write("control", {"check": "values.exact", "control": "failed as it must"})
    with path.open("a") as file:
        file.write('{"type": "case", "cut o')
    found = read_log(path)
    assert found.header == HEADER
    assert found.results == (("covering", replace(RESULT, failures=())),)
    assert found.controls == {"values.exact": "failed as it must"}
    assert not found.ended
    with ResultsLog(path, resume=True) as log:
        log.write("end", {"cases": 1})
    assert read_log(path).ended


@pytest.mark.parametrize("text", ["", "{}\n", '{"type": "case"}\n', "no json\n", "[]\n"])
def test_a_file_that_is_no_log_is_a_usage_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"results\.jsonl"):
        read_log(path)


def test_a_missing_log_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read_log(tmp_path / "none.jsonl")


def test_seconds_add_up_to_the_same_bits_on_every_python() -> None:
    tally = Tally(results=[replace(RESULT, seconds=0.1)] * 10)
    (state,) = tally.operator_states(HEADER)
    # Added one after the other these are 0.9999999999999999, as Python 3.11 adds them; 3.12 does not.
    assert state.seconds == 1.0
