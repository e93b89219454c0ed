"""``polyaccel conformance mutants``, and the bugs that a certifying run plants around a backend."""

from __future__ import annotations

import datetime
import json
from dataclasses import replace
from pathlib import Path

import pytest

from polyaccel_conformance.cli import power
from polyaccel_conformance.cli.main import main
from polyaccel_conformance.errors import ExitCode
from polyaccel_conformance.mutants import series
from polyaccel_conformance.mutants.mutant import Mutant
from polyaccel_conformance.mutants.score import Score
from polyaccel_conformance.mutants.series import Outcome
from polyaccel_conformance.problems.registry import PROBLEM_SETS
from polyaccel_conformance.results import RunHeader, RunResult
from polyaccel_conformance.schedule import countable
from polyaccel_conformance.subject import Subject

RUN = RunResult(
    header=RunHeader(
        subject=Subject(), profile="certify", seed=1, checks=(), operators=(), started="2026-03-01T10:00:00+00:00"
    ),
    operators=(),
    checks=(),
    cells=(),
    failures=(),
)


def test_a_mutant_that_is_named_is_run_and_the_summary_counts_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mutants", "gelu.copies_uncounted"]) == ExitCode.PASS
    said = capsys.readouterr().out
    assert "found by layout.arguments" in said
    assert "1 of 1 mutants found" in said


def test_an_unknown_mutant_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mutants", "nobody"]) == ExitCode.USAGE
    assert "no mutant 'nobody'" in capsys.readouterr().err


def test_seeds_are_recorded_beside_the_page(tmp_path: Path) -> None:
    page = tmp_path / "mutants.md"
    arguments = ["mutants", "gelu.copies_uncounted", "--seeds", "2", "--seed", "7", "--matrix", str(page)]
    assert main(arguments) == ExitCode.PASS
    recorded = json.loads(page.with_suffix(".json").read_text())["mutants"]["gelu.copies_uncounted"]
    assert list(recorded["seeds"]) == ["7", "8"]


@pytest.mark.parametrize(
    ("result", "asked"),
    [
        (RUN, True),
        (replace(RUN, incomplete="interrupted"), False),
        (replace(RUN, device_lost="gone"), False),
        (replace(RUN, header=replace(RUN.header, profile="quick")), False),
        (replace(RUN, header=replace(RUN.header, selection="-k gelu")), False),
        (replace(RUN, header=replace(RUN.header, subject=Subject(mutant="linear.tf32"))), False),
    ],
)
def test_bugs_are_planted_after_a_whole_run_that_certifies(result: RunResult, asked: bool) -> None:
    assert power.asked(result) is asked


@pytest.mark.parametrize("missed", [(), ("gelu.always_tanh",)])
def test_what_became_of_planted_bugs_is_shown_and_logged(
    missed: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def around(subject: Subject, date: datetime.date, *_: object) -> Outcome:
        assert (subject.name, date) == ("cpu", datetime.date(2026, 3, 1))
        return Outcome(scores=(Score(mutant="gelu.always_tanh", cases=3, failing=1),), missed=missed)

    monkeypatch.setattr(series, "around", around)
    (tmp_path / "results.jsonl").write_text('{"type": "run"}\n')
    assert power.shown(RUN, tmp_path) is (not missed)
    logged = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert logged[1] == {"type": "mutant", "mutant": "gelu.always_tanh", "found": not missed, "cases": 3}
    said = capsys.readouterr().out
    assert f"{1 - len(missed)} of 1 mutants found" in said
    assert ("survives around backend 'cpu'" in said) is bool(missed)


def test_sets_of_few_or_slow_cases_are_run_whole_without_the_fixed_lists() -> None:
    assert countable(PROBLEM_SETS["cache.identity"])
    assert countable(PROBLEM_SETS["model.tokens"])
    assert not countable(PROBLEM_SETS["linear"])
    assert not countable(PROBLEM_SETS["storage.kv"])


def test_by_date_every_operator_is_asked_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []

    def examine(mutant: Mutant, _: object, operators: list[str]) -> Score:
        asked.append(tuple(operators))
        return Score(mutant=mutant.name, cases=1, failing=0)

    monkeypatch.setattr(series, "examine", examine)
    outcome = series.whole_of_quick(3, datetime.date(2026, 3, 1), None, lambda text: None)  # type: ignore[arg-type]
    assert len(asked) == len(outcome.missed) == 3
    assert all(set(PROBLEM_SETS) <= set(operators) for operators in asked)
