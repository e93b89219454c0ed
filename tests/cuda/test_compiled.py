"""What the interpreter takes, the compiler takes too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.plugins import ROOT

GROUPS = ("few_rows", "adapters", "rows", "attention", "sampling")


@pytest.mark.parametrize("target", ["Hopper:bfloat16", "Ampere:float32"])
def test_every_kernel_compiles_for_a_gpu_that_is_not_there(target: str, tmp_path: Path) -> None:
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    variables["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-W", "ignore", "-m", "tests.cuda.compiled", target]
    done = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split("\n")[:-1] == [f"{target} {group}" for group in GROUPS]
