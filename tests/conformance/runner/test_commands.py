"""``polyaccel conformance run`` and ``replay`` as a user meets them."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

from polyaccel.cli.main import main
from polyaccel_conformance.cli import main as suite_main
from polyaccel_conformance.errors import ExitCode
from polyaccel_conformance.progress import ProgressLine
from polyaccel_conformance.results import RunResult

TABLES = Path(__file__).with_name("tables.py")


def command(*words: str, table: str = "WRONG", out: Path) -> int:
    common = ["--profile", "quick", "--checks", "values.bound", "-k", "dtype=float32 and data=normal"]
    return main(["conformance", "run", "--table", f"{TABLES}:{table}", "--out", str(out), *common, *words])


def test_a_failure_is_one_block_and_its_replay_command_works(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(out=tmp_path) == ExitCode.FAIL
    output = capsys.readouterr().out
    blocks = re.findall(r"^FAILED .*(?:\n  .*)+", output, re.MULTILINE)
    assert len(blocks) == 1
    for word in ("case ", "message ", "worst ", "bound ", "wrong ", "replay ", "got ", "expected ", "err ", "tol "):
        assert word in blocks[0], word
    assert output.strip().splitlines()[-1].startswith("FAIL: ")
    stored = RunResult.from_json(json.loads((tmp_path / "result.json").read_text()))
    assert stored.exit_code is ExitCode.FAIL
    words = re.search(r"replay    polyaccel (.*)", blocks[0])
    assert words is not None
    assert main(words[1].split()) == ExitCode.FAIL
    shown = capsys.readouterr().out
    assert "inputs identical: yes" in shown
    assert "outputs identical: yes" in shown
    assert "\nREPRODUCED\n" in shown
    assert main([*words[1].split(), "--backend", "cpu"]) == ExitCode.PASS
    assert "\nNOT REPRODUCED\n" in capsys.readouterr().out


def test_a_right_table_passes_in_one_line_an_operator(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(table="RIGHT", out=tmp_path) == ExitCode.PASS
    output = capsys.readouterr().out
    assert "FAILED" not in output
    assert re.search(r"^layer_norm +passed: \d+ cases \(\d+ native\)", output, re.MULTILINE)
    assert "not in the table: " in output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "--backend", "no-such"], "no backend 'no-such' is installed"),
        (["run", "--table", "no-colon"], "FILE.py:NAME"),
        (["run", "--table", "/nowhere/t.py:TABLE"], "is not a file"),
        (["run", "--backend", "cpu", "--devices", "0"], "--devices 0"),
        (["run", "--backend", "cpu", "--workers", "0"], "--workers 0"),
        (["replay", "/nowhere/case.json"], "cannot be read"),
    ],
)
def test_wrong_usage_is_one_line_and_code_two(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert suite_main(words) == ExitCode.USAGE
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_without_the_suite_the_command_says_how_to_install_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "hypothesis" else find(name))
    assert main(["conformance", "run", "--backend", "cpu"]) == 2
    assert 'pip install "polyaccel[conformance]"' in capsys.readouterr().err


def test_the_command_is_listed_in_the_programs_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "conformance" in capsys.readouterr().out


class Terminal:
    """Keeps what is written."""

    def __init__(self, terminal: bool) -> None:
        self.text, self._terminal = "", terminal

    def isatty(self) -> bool:
        return self._terminal

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        return None


def test_progress_is_one_line_on_a_terminal_and_nothing_elsewhere() -> None:
    terminal, file = Terminal(True), Terminal(False)
    for stream in (terminal, file):
        line = ProgressLine(stream)  # type: ignore[arg-type]
        line.update(5, 10, 1, "linear")
        line.update(10, 10, 1, "linear")
        line.clear()
    assert file.text == ""
    assert "\n" not in terminal.text
    assert "10/10, 1 failed" in terminal.text
    assert terminal.text.endswith(" \r")
