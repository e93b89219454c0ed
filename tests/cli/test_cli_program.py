"""The command as a program of its own: ``python -m polyaccel.cli.main`` and ``python -m polyaccel``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import pytest

import polyaccel
from tests.cli.console import ENGINE
from tests.support.tiny_model import TinyModel

ROOT = Path(__file__).resolve().parents[2]
MODULES = ("polyaccel", "polyaccel.cli.main")


def program(
    *arguments: object,
    stdin: bytes = b"",
    stdout: int | IO[bytes] = subprocess.PIPE,
    variables: Mapping[str, str] | None = None,
    module: str = "polyaccel.cli.main",
) -> subprocess.CompletedProcess[bytes]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        input=stdin,
        stdout=stdout,
        stderr=subprocess.PIPE,
        env={**environment, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1", **(variables or {})},
        timeout=120,
        check=False,
    )


def test_the_program_answers_a_prompt_from_a_pipe(tiny: TinyModel) -> None:
    done = program("generate", tiny.folder, "-", *ENGINE, "--max-tokens", 1, "--json", stdin=b"the thing")
    assert (done.returncode, done.stderr) == (0, b"")
    row = json.loads(done.stdout)
    assert row["prompt"] == "the thing"
    assert row["token_ids"] == tiny.greedy(tiny.tokenizer.encode("the thing"), 1)


def test_the_program_exits_with_1_and_one_line_for_an_error_of_the_engine(tmp_path: Path) -> None:
    done = program("generate", tmp_path / "nowhere", "hi")
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.startswith(b"polyaccel: ModelNotFound: ")
    assert done.stderr.count(b"\n") == 1


def test_the_program_exits_with_2_for_wrong_usage() -> None:
    done = program("bench", "model", "--repeats", "0")
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr == b"polyaccel: --repeats must be at least 1, not 0\n"


@pytest.mark.parametrize("variables", [{}, {"PYTHONUNBUFFERED": "1"}], ids=["buffered", "unbuffered"])
def test_a_reader_of_the_output_that_has_gone_is_no_error(variables: dict[str, str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = program("backends", stdout=writer, variables=variables)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


def test_an_answer_that_the_output_cannot_hold_exits_with_1_and_one_line(tiny: TinyModel) -> None:
    options = ("generate", tiny.folder, "hello", *ENGINE, "--max-tokens", 4)
    shown = program(*options)
    assert not shown.stdout.isascii()
    done = program(*options, variables={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 1
    assert done.stderr == (
        b"polyaccel: standard output is ascii and cannot show the answer; PYTHONUTF8=1 makes it UTF-8\n"
    )


def test_the_program_names_its_version() -> None:
    done = program("--version")
    assert (done.returncode, done.stdout.decode()) == (0, f"polyaccel {polyaccel.__version__}\n")


@pytest.mark.parametrize(
    "arguments",
    [("--help",), ("--version",), (), ("nonsense",), ("bench", "model", "--repeats", "0"), ("conformance", "--help")],
    ids=" ".join,
)
def test_the_package_run_as_a_program_is_the_command(arguments: tuple[str, ...]) -> None:
    package, command = (program(*arguments, module=module) for module in MODULES)
    assert (package.returncode, package.stdout, package.stderr) == (
        command.returncode,
        command.stdout,
        command.stderr,
    )
    assert package.stdout or package.stderr
    assert b"__main__" not in package.stdout + package.stderr


def test_the_package_run_as_a_program_calls_itself_polyaccel_and_exits_as_the_command_does(tmp_path: Path) -> None:
    usage = program(module="polyaccel")
    assert usage.returncode == 2
    assert usage.stderr.startswith(b"usage: polyaccel ")
    failed = program("generate", tmp_path / "nowhere", "hi", module="polyaccel")
    assert (failed.returncode, failed.stdout) == (1, b"")
    assert failed.stderr.startswith(b"polyaccel: ModelNotFound: ")
