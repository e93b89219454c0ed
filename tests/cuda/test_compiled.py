"""What the interpreter takes, the compiler takes too."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.plugins import ROOT

GROUPS = ("few_rows", "adapters", "rows", "attention", "sampling")
TARGETS = ("Hopper:bfloat16", "Ampere:float32")


@pytest.fixture(scope="module")
def compiling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[subprocess.Popen[str], Path]]]:
    """Both at once: one takes a core for a minute and a half."""
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    begun: dict[str, tuple[subprocess.Popen[str], Path]] = {}
    for number, target in enumerate(TARGETS):
        folder = tmp_path_factory.mktemp(f"target{number}")
        variables["TRITON_CACHE_DIR"] = str(folder / "cache")
        command = [sys.executable, "-W", "ignore", "-m", "tests.cuda.compiled", target]
        # A pipe that nobody reads yet could fill.
        with (folder / "errors").open("w") as errors:
            begun[target] = (
                subprocess.Popen(command, env=variables, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True),
                folder / "errors",
            )
    yield begun
    for process, _ in begun.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles_for_a_gpu_that_is_not_there(
    target: str, compiling: dict[str, tuple[subprocess.Popen[str], Path]]
) -> None:
    process, errors = compiling[target]
    out, _ = process.communicate()
    assert process.returncode == 0, errors.read_text()[-3000:]
    assert out.split("\n")[:-1] == [f"{target} {group}" for group in GROUPS]
