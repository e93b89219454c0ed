"""Runs the command line inside this process, and names the options of a small engine."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass

import pytest

from polyaccel.cli.main import main

KV_CACHE_BYTES = 4_000_000
ENGINE = ("--backend", "cpu", "--dtype", "float32", "--threads", "1", "--kv-cache-bytes", str(KV_CACHE_BYTES))


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a command gave: its exit code and what it wrote."""

    code: int
    out: str
    err: str


def run(*arguments: object, stdin: str | bytes = "") -> Outcome:
    """The outcome of ``polyaccel ARGUMENTS``; bytes on stdin are decoded as strict UTF-8 by the command."""
    out, err = io.StringIO(), io.StringIO()
    data = stdin if isinstance(stdin, bytes) else stdin.encode()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as exit_:  # argparse leaves this way
            code = exit_.code if isinstance(exit_.code, int) else 0
    return Outcome(code=code, out=out.getvalue(), err=err.getvalue())


def printed(*arguments: object, stdin: str = "") -> str:
    """What a command that must succeed, and say nothing on stderr, prints."""
    outcome = run(*arguments, stdin=stdin)
    assert (outcome.code, outcome.err) == (0, ""), outcome
    return outcome.out


def lines(texts: Sequence[str]) -> str:
    """The texts as the command prints them, each with a newline behind it."""
    return "".join(f"{text}\n" for text in texts)
