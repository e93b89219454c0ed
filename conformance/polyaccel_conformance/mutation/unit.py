"""A mutant's own unit tests: what the suite's cases cannot ask, such as how ranks meet or what a store holds unseen."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from polyaccel_conformance.mutation.install import sources
from polyaccel_conformance.mutation.subject import install_named
from polyaccel_conformance.workers.process import ForkServer

TARGET = "polyaccel_conformance.mutation.unit:main"
TIMEOUT = 180.0
PREFIX = "unit test "


def unit_tests_of(file: str, folder: Path) -> list[str]:
    """The test files of a source file: ``test_moe.py``, ``test_moe_blocks.py`` for ``moe.py``."""
    stem, names = file.removesuffix(".py"), {path.stem for path in folder.glob("test_*.py")}
    found = sorted(name for name in names if name == f"test_{stem}" or name.startswith(f"test_{stem}_"))
    # test_sampling_state.py belongs to sampling_state.py alone.
    longer = {
        f"test_{other.removesuffix('.py')}" for other in sources() if other != file and other.startswith(f"{stem}_")
    }
    return [str(folder / f"{name}.py") for name in found if name not in longer]


def first_failure(name: str, tests: Sequence[str], server: ForkServer) -> str:
    """The first unit test that fails with the mutant of this name (see ``subject``), or how its process ended; empty if
    all pass or there are none."""
    if not tests:
        return ""
    process, connection = server.start(TARGET, {"name": name, "tests": list(tests)}, os.devnull)
    with closing(connection):
        try:
            if connection.poll(TIMEOUT):
                found: str = json.loads(connection.recv_bytes())
                return found and PREFIX + found
        except EOFError:
            return f"{PREFIX}crash"
        finally:
            process.kill()
            process.wait(5.0)
    return f"{PREFIX}hang"


def main(connection: Connection, name: str, tests: Sequence[str]) -> None:
    """Install the mutant, run pytest until something fails, send its name."""
    import pytest

    processes: Any = importlib.import_module("torch.multiprocessing")

    def forked(fn: Callable[..., Any], args: tuple[Any, ...] = (), nprocs: int = 1) -> None:
        processes.start_processes(fn, args, nprocs, start_method="fork")

    install_named(name)
    # A new interpreter would not have the mutant.
    processes.spawn = forked
    watch = _Watch()
    pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests], plugins=[watch])
    connection.send_bytes(json.dumps(watch.failed).encode())


class _Watch:
    """A plugin that remembers the first failure."""

    def __init__(self) -> None:
        self.failed = ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.failed:
            self.failed = str(report.nodeid).rpartition("/")[2]

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and not self.failed:
            self.failed = f"{report.nodeid} cannot be imported"
