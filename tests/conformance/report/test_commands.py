"""The commands that report and verify: exit codes, and errors that say what is wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from polyaccel_conformance.certificate.bundle import write_bundle
from polyaccel_conformance.certificate.recount import recount
from polyaccel_conformance.check import CaseResult
from polyaccel_conformance.cli import main
from polyaccel_conformance.errors import ExitCode
from polyaccel_conformance.log import read_log
from polyaccel_conformance.report.markdown import markdown
from polyaccel_conformance.report.page import page
from polyaccel_conformance.report.terminal import terminal
from tests.conformance.certificate.small_run import FAILURE, failing, rewritten, write_log


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run in which every case of one operator failed."""
    path = tmp_path_factory.mktemp("run")
    write_log(path / "results.jsonl", change=failing)
    return path


def test_a_report_of_a_failed_run_writes_every_form_and_fails(folder: Path, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("r.json", "r.md", "r.html", "r.tar.xz")]
    options = zip(("--json", "--markdown", "--html", "--bundle"), map(str, files), strict=True)
    assert main(["report", str(folder), *(word for pair in options for word in pair)]) == ExitCode.FAIL
    assert all(path.stat().st_size > 1000 for path in files)


def test_waivers_that_cover_every_failure_let_the_run_pass(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "waivers.toml"
    table = '[[waiver]]\ntest = "select_rows/values.exact/*"\nreason = "known"\nurl = "https://github.com/acme"\n'
    path.write_text(f"{table}expires = 2030-01-01\n", encoding="utf-8")
    assert main(["report", str(folder), "--waivers", str(path)]) == ExitCode.PASS
    path.write_text(f"{table}expires = 2020-01-01\n", encoding="utf-8")
    assert main(["report", str(folder), "--waivers", str(path)]) == ExitCode.FAIL


def test_a_certificate_edited_by_hand_is_named_and_fails(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_bundle(tmp_path / "b.tar.xz", folder / "results.jsonl")

    def change(files: dict[str, bytes]) -> None:
        files["summary.json"] = files["summary.json"].replace(b"not granted", b"granted")

    edited = rewritten(tmp_path / "b.tar.xz", tmp_path / "edited.tar.xz", change)
    assert main(["verify", str(edited)]) == ExitCode.FAIL
    assert "summary.json does not match its hash: it was edited by hand" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["run", "--backend", "nosuch"], "no backend 'nosuch' is installed; installed are"),
        (["run", "--backend", "cpu", "--devices", "999"], "--devices 999"),
        (["report"], "name the folder of a run"),
        (["report", "nowhere"], "nowhere cannot be read"),
        (["verify", "nowhere.tar.xz"], "nowhere.tar.xz cannot be read"),
        (["report", "--diff", "nowhere", "nowhere"], "nowhere cannot be read"),
    ],
)
def test_what_cannot_be_done_is_a_usage_error_that_says_why(
    words: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == ExitCode.USAGE
    assert says in capsys.readouterr().err


def test_the_null_backend_fails_before_its_first_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--backend", "null", "--out", str(tmp_path)]) == ExitCode.FAIL
    assert "FAIL  stores float32" in capsys.readouterr().out


def test_two_runs_are_compared_without_a_bundle(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_log(tmp_path / "results.jsonl")
    assert main(["report", "--diff", str(tmp_path), str(folder)]) == ExitCode.PASS
    said = capsys.readouterr().out
    assert "select_rows: failed 0 -> " in said
    assert "values.exact: passed -> failed" in said


def test_a_page_sets_several_runs_side_by_side_and_names_what_is_wrong_in_each(folder: Path, tmp_path: Path) -> None:
    write_log(tmp_path / "right" / "results.jsonl")
    out = tmp_path / "page.md"
    runs = [f"right settings={tmp_path / 'right'}", f"TF32 = on={folder}"]
    assert main(["numerics", *runs, "--title", "CUDA", "--out", str(out)]) == ExitCode.PASS
    text = out.read_text(encoding="utf-8")
    assert text.startswith("# CUDA\n")
    right, wrong = (line for line in text.splitlines() if line.startswith("| ["))
    assert right.endswith("| none | none |")
    assert wrong.endswith("| `values.exact` | `select_rows` |")
    assert main(["numerics", "nothing"]) == ExitCode.USAGE


def test_headroom_is_written_as_a_table_by_operator_and_dtype(tmp_path: Path) -> None:
    def measured(result: CaseResult) -> CaseResult:
        worst = 0.25 if result.case.dtype == "float32" else 0.75
        return replace(result, headroom={"y": worst} if result.case.operator == "select_rows" else {})

    write_log(tmp_path / "results.jsonl", change=measured)
    main(["report", str(tmp_path), "--headroom", str(tmp_path / "h.md")])
    lines = (tmp_path / "h.md").read_text(encoding="utf-8").splitlines()
    assert "| operator | output | float32 | bfloat16 | float16 |" in lines
    assert "| `select_rows` | y | 0.25 | 0.75 | 0.75 |" in lines


def test_a_report_of_a_table_shows_what_was_never_promised_in_every_form(tmp_path: Path) -> None:
    def excused(result: CaseResult) -> CaseResult:
        failure = replace(FAILURE, not_promised="only dense rows are taken")
        return replace(result, failures=(failure,)) if result.case.operator == "select_rows" else result

    log = tmp_path / "results.jsonl"
    write_log(log, change=excused)
    claimed = recount(read_log(log))
    assert claimed.result.failures, "a backend promises the whole contract, whatever its log says"
    assert claimed.result.not_promised == ()
    head, *cases_of_it = log.read_text(encoding="utf-8").splitlines(keepends=True)
    header = json.loads(head)
    header["subject"] |= {"kind": "table", "path": "acme.py", "name": "ACME"}
    log.write_text("".join([json.dumps(header) + "\n", *cases_of_it]), encoding="utf-8")
    report = recount(read_log(tmp_path / "results.jsonl"))
    cases = next(state.not_promised for state in report.result.operators if state.operator == "select_rows")
    assert cases > 0
    for text in (terminal(report), markdown(report), page(report), json.dumps(report.to_json())):
        assert "only dense rows are taken" in text
    assert "FAILED" not in terminal(report)
    assert next(state.verdict for state in report.result.checks if state.check == "values.exact") == "not promised"
