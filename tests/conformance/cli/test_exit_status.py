"""Every exit status of the documentation, reached by a command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from polyaccel_conformance.cli import main
from polyaccel_conformance.errors import ExitCode

TABLES = Path(__file__).parents[1] / "runner" / "tables.py"
FEW = ("--profile", "quick", "--checks", "values.exact,values.bound", "--no-progress", "--no-shrink")


def run(table: str, out: Path, *words: str) -> int:
    return main(["run", "--table", f"{TABLES}:{table}", "--out", str(out), *FEW, *words])


@pytest.mark.slow
def test_0_all_passed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("RIGHT", tmp_path, "-k", "dtype=float32 and data=normal") == 0
    out = capsys.readouterr().out
    assert out.startswith("preflight passed in ")
    assert "PASS: " in out


@pytest.mark.slow
def test_1_a_case_failed(tmp_path: Path) -> None:
    assert run("WRONG", tmp_path, "-k", "dtype=float32 and data=normal") == 1


def test_2_the_command_line_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("NUMBER", tmp_path) == 2
    assert "expected a mapping or a Backend" in capsys.readouterr().err


@pytest.mark.slow
def test_3_the_run_is_partial_and_resume_completes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("-k", "dtype=float32 and data=normal")
    assert run("RIGHT", tmp_path, *words, "--budget", "0") == 3
    assert "--resume goes on" in capsys.readouterr().out
    assert run("RIGHT", tmp_path, *words, "--resume") == 0


@pytest.mark.slow
def test_4_the_device_is_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("Lost", tmp_path, "--operators", "rms_norm") == 4
    out = capsys.readouterr().out
    assert "DEVICE LOST: " in out
    assert (tmp_path / "results.jsonl").is_file()


@pytest.mark.slow
def test_5_a_replayed_case_fails_in_another_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("WRONG", tmp_path, "-k", "dtype=float32 and data=normal") == 1
    path = next((tmp_path / "cases").glob("*.json"))
    case = json.loads(path.read_text(encoding="utf-8"))
    case["failure"]["cause"] = "another"
    path.write_text(json.dumps(case), encoding="utf-8")
    assert main(["replay", str(path)]) == ExitCode.DIFFERENT_FAILURE == 5
    assert "DIFFERENT FAILURE" in capsys.readouterr().out


@pytest.mark.slow
def test_a_part_of_a_run_on_other_sources_is_not_gone_on_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("-k", "dtype=float32 and data=normal")
    assert run("RIGHT", tmp_path, *words, "--budget", "0") == 3
    log = tmp_path / "results.jsonl"
    first, *rest = log.read_text(encoding="utf-8").splitlines(keepends=True)
    header = json.loads(first)
    header["environment"]["source.core"] = "0" * 32
    log.write_text(json.dumps(header) + "\n" + "".join(rest), encoding="utf-8")
    assert run("RIGHT", tmp_path, *words, "--resume") == 2
    assert "it was started with other options, backend or suite" in capsys.readouterr().err
