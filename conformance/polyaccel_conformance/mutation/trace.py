"""Which lines of a package each case executes."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any

from polyaccel_conformance.case import Case
from polyaccel_conformance.check import run_case
from polyaccel_conformance.mutation.install import sources
from polyaccel_conformance.problems.registry import PROBLEM_SETS
from polyaccel_conformance.subject import Subject
from polyaccel_conformance.workers.worker import checks_named, open_bench

TARGET = "polyaccel_conformance.mutation.trace:main"

Lines = set[tuple[str, int]]
"""File name inside the package, and line."""


@contextmanager
def traced(files: Mapping[str, str], seen: Lines) -> Iterator[None]:
    """Note executed lines of ``files``, names by path, of all threads."""

    def call(frame: FrameType, event: str, argument: object) -> Callable[..., Any] | None:
        name = files.get(frame.f_code.co_filename)
        if name is None:
            return None

        def line(frame: FrameType, event: str, argument: object) -> Callable[..., Any]:
            seen.add((name, frame.f_lineno))
            return line

        return line

    before = sys.gettrace()
    threading.settrace(call)
    sys.settrace(call)
    try:
        yield
    finally:
        sys.settrace(before)
        threading.settrace(before)


def main(connection: Connection, subject: Mapping[str, str], checks: Sequence[str]) -> None:
    """Serve: a case in JSON brings ``failures`` (checks) and ``lines`` (pairs), until the parent closes."""
    bench, _ = open_bench(Subject.from_json(subject), 0)
    files = {str(Path(path)): name for name, path in sources().items()}
    asked = checks_named(list(checks))
    while True:
        try:
            case = Case.from_json(json.loads(connection.recv_bytes()))
        except EOFError:
            break
        seen: Lines = set()
        with traced(files, seen):
            result = run_case(bench, PROBLEM_SETS[case.operator].problem(case), asked)
        failures = [failure.check for failure in result.failures]
        connection.send_bytes(json.dumps({"failures": failures, "lines": sorted(seen)}).encode())
    bench.backend.close()
