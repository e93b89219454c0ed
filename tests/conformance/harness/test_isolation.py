"""Functions in processes of their own: every way in which one can end is told apart."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from polyaccel_conformance.errors import ConformanceError
from polyaccel_conformance.harness.isolation import run_isolated
from polyaccel_conformance.workers.process import ForkServer

HERE = "tests.conformance.harness.test_isolation"


def give_back(value: object) -> list[object]:
    return [value, os.getpid()]


def fail() -> None:
    raise ValueError("no such thing")


def die() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def leave() -> None:
    os._exit(7)


def sleep() -> None:
    time.sleep(60)


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    found = ForkServer()
    yield found
    found.close()


def test_a_value_comes_back_from_another_process(server: ForkServer) -> None:
    found = run_isolated(server, f"{HERE}:give_back", {"a": 1})
    assert found.ending == "value"
    assert found.value[0] == {"a": 1}
    assert found.value[1] != os.getpid()


def test_errors_signals_exits_and_hangs_are_told_apart(server: ForkServer) -> None:
    raised = run_isolated(server, f"{HERE}:fail")
    assert (raised.ending, raised.error, raised.message) == ("error", "ValueError", "no such thing")
    killed = run_isolated(server, f"{HERE}:die")
    assert (killed.ending, killed.signal) == ("killed", "SIGSEGV")
    left = run_isolated(server, f"{HERE}:leave")
    assert (left.ending, left.signal) == ("killed", "exit code 7")
    assert run_isolated(server, f"{HERE}:sleep", timeout=0.2).ending == "timeout"


def test_a_function_that_does_not_exist_is_refused_before_anything_starts(server: ForkServer) -> None:
    for target in ("no.such.module:f", f"{HERE}:no_such", f"{HERE}:HERE"):
        with pytest.raises(ConformanceError, match="function"):
            run_isolated(server, target)
