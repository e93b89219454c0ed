"""Tests of the simulator. Those that need torch_npu run in its own environment: ``tox -e npu-sim``."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from polyaccel_cannsim import installed

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
Program = Callable[..., str]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    npu = importlib.util.find_spec("torch_npu") is not None
    for item in items:
        if HERE not in item.path.parents:
            continue
        names = getattr(item, "fixturenames", ())
        if "program" in names and not npu:
            item.add_marker(pytest.mark.skip(reason="torch_npu is not installed; run tox -e npu-sim"))
        elif "cannsim" in names and not installed():
            reason = (
                "no simulated cards in this process; run tox -e npu-sim (pytest -p polyaccel_cannsim.pytest_plugin)"
            )
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def program() -> Program:
    """Runs Python text under the simulator in a process of its own; what fails asynchronously poisons its process.

    ``program(text, status=0, **environment)`` hands back standard output and error together. ``status`` is the exit
    code that must come.
    """

    def run(text: str, status: int = 0, **environment: str) -> str:
        env = {name: value for name, value in os.environ.items() if not name.startswith(("CANNSIM_", "ASCEND_"))}
        env.pop("TASK_QUEUE_ENABLE", None)
        env.pop("TORCH_DEVICE_BACKEND_AUTOLOAD", None)
        env |= {
            "PYTHONPATH": os.pathsep.join([str(ROOT / "backends"), str(ROOT)]),
            "OMP_NUM_THREADS": "1",
        } | environment
        line = [sys.executable, "-m", "polyaccel_cannsim", "run", "--", sys.executable, "-c", textwrap.dedent(text)]
        done = subprocess.run(line, env=env, cwd=ROOT, capture_output=True, text=True, timeout=120)
        out = done.stdout + done.stderr
        assert done.returncode == status, out
        return out

    return run
