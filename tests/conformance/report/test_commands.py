"""The commands that report and verify: exit codes, and errors that say what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from polyaccel_conformance.certificate.bundle import write_bundle
from polyaccel_conformance.cli import main
from polyaccel_conformance.errors import ExitCode
from tests.conformance.certificate.small_run import failing, rewritten, write_log


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
