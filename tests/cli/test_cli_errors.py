"""Exit codes: 2 for wrong usage, 1 for an error of the engine, each with one line on stderr that says what is wrong."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from polyaccel.backend.errors import EngineDead
from polyaccel.cli import backends
from tests.cli.console import ENGINE, Outcome, run
from tests.support.tiny_model import TinyModel


def assert_refused(outcome: Outcome, code: int, *words: str) -> None:
    """One line on stderr with these words, nothing on stdout, no traceback."""
    assert (outcome.code, outcome.out) == (code, ""), outcome
    assert outcome.err.startswith("polyaccel: ")
    assert outcome.err.endswith("\n")
    assert outcome.err.count("\n") == 1, outcome.err
    assert "Traceback" not in outcome.err
    for word in words:
        assert word in outcome.err


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ((), "command"),
        (("translate", "model"), "translate"),
        (("generate",), "model"),
        (("generate", "model"), "prompt"),
        (("generate", "model", "hi", "--no-such-option"), "--no-such-option"),
        (("generate", "model", "hi", "--max-tokens", "many"), "many"),
        (("generate", "model", "hi", "--dtype", "int3"), "int3"),
        (("generate", "model", "hi", "--executor", "cloud"), "cloud"),
        (("chat", "model", "--policy", "lax"), "lax"),
        (("bench", "model", "--repeats", "1.5"), "1.5"),
    ],
)
def test_a_command_line_that_cannot_be_parsed_exits_with_2(arguments: tuple[str, ...], word: str) -> None:
    outcome = run(*arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("usage: polyaccel")
    assert word in outcome.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("generate", "model", "hi", "--load-adapter", "folder"), ("'folder'", "NAME=FOLDER")),
        (("generate", "model", "hi", "--load-adapter", "=folder"), ("'=folder'", "NAME=FOLDER")),
        (("explain", "model", "--load-adapter", "name="), ("'name='", "NAME=FOLDER")),
        (("chat", "model", "--load-adapter", "a=x", "--load-adapter", "a=y"), ("'a' twice",)),
        (("generate", "model", "hi", "--adapter", "a=heavy"), ("'a'", "'heavy'")),
        (("generate", "model", "hi", "--adapter", "a=1,b=2,a=3"), ("'a' twice",)),
        (("bench", "model", "--batch-size", "0"), ("--batch-size", "0")),
        (("bench", "model", "--repeats", "-1"), ("--repeats", "-1")),
    ],
)
def test_options_that_make_no_sense_exit_with_2(arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    assert_refused(run(*arguments), 2, *words)


def test_input_that_is_no_text_exits_with_2() -> None:
    assert_refused(run("generate", "model", "-", stdin=b"caf\xe9 \xff"), 2, "standard input", "utf-8")


def test_a_model_that_does_not_exist_exits_with_1(tmp_path: Path) -> None:
    assert_refused(run("generate", tmp_path / "nowhere", "hi"), 1, "ModelNotFound", "nowhere")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--backend", "abacus"), ("BackendUnavailable", "abacus")),
        (("--max-num-seqs", "0"), ("ConfigurationError", "max_num_seqs=0")),
        (("--memory-fraction", "1.5"), ("ConfigurationError", "memory_fraction=1.5")),
        (("--executor", "inline", "--tensor-parallel-size", "2"), ("ConfigurationError", "executor='process'")),
        (("--kv-cache-bytes", "16"), ("OutOfMemory", "kv_cache_bytes")),
        (("--max-tokens", "0"), ("RequestRejected", "max_tokens=0")),
        (("--temperature", "-1"), ("RequestRejected", "temperature=-1")),
        (("--max-model-len", "4"), ("RequestTooLong", "4")),
        (("--adapter", "parrot"), ("AdapterNotFound", "'parrot'")),
        (("--load-adapter", "parrot=nowhere"), ("Adapter", "nowhere")),
    ],
)
def test_what_the_engine_refuses_exits_with_1(
    tiny: TinyModel, options: tuple[str, ...], words: tuple[str, ...]
) -> None:
    assert_refused(run("generate", tiny.folder, "the thing", *ENGINE, *options), 1, *words)


def test_a_prompt_that_is_no_text_exits_with_1(tiny: TinyModel) -> None:
    assert_refused(run("generate", tiny.folder, "a\udcff", *ENGINE), 1, "RequestRejected", "surrogates")


@pytest.mark.parametrize("executor", ["inline", "process"])
def test_a_broken_checkpoint_exits_with_1_and_without_a_worker_s_traceback(
    tiny: TinyModel, tmp_path: Path, executor: str
) -> None:
    folder = Path(shutil.copytree(tiny.folder, tmp_path / "model"))
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(60_000)
    outcome = run("generate", folder, "hi", *ENGINE, "--executor", executor)
    assert_refused(outcome, 1, "ModelLoadError", "model.safetensors", "60000")


def test_a_worker_s_own_error_exits_with_1_and_without_its_traceback(tiny: TinyModel) -> None:
    outcome = run("generate", tiny.folder, "hi", *ENGINE, "--executor", "process", "--kv-cache-bytes", "16")
    assert_refused(outcome, 1, "OutOfMemory", "kv_cache_bytes")


def test_an_error_of_several_lines_is_put_on_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise EngineDead("it died\n  of something\n\n--- traceback of rank 0 ---\nTraceback: secret")

    monkeypatch.setattr(backends, "list_backends", fail)
    outcome = run("backends")
    assert (outcome.code, outcome.err) == (1, "polyaccel: EngineDead: it died; of something\n")


def test_an_interrupt_exits_with_130_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(backends, "list_backends", interrupt)
    assert run("backends") == Outcome(code=130, out="", err="")
