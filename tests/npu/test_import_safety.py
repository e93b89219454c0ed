"""torch_npu is installed and CANN is not: polyaccel, the CPU backend and the list of backends work all the same."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torch_npu") is None, reason="torch_npu is not installed; run tox -e npu-sim"
)


def _without_cann(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A Python process that sees torch_npu, and neither CANN nor simulated cards."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("CANNSIM_", "ASCEND_"))}
    variables.pop("LD_LIBRARY_PATH", None)
    import_path = variables.pop("PYTHONPATH", "").split(os.pathsep)
    kept = [part for part in import_path if part and not part.endswith(os.path.join("polyaccel_cannsim", "site"))]
    if kept:
        variables["PYTHONPATH"] = os.pathsep.join(kept)
    variables.pop(AUTOLOAD, None)
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, env=variables, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False
    )


def test_a_plain_import_of_torch_fails_here_which_is_what_the_others_are_about(tmp_path: Path) -> None:
    done = _without_cann(tmp_path, "-c", "import torch")
    if done.returncode == 0:
        pytest.skip("CANN is installed on this machine")
    assert AUTOLOAD in done.stderr


def test_the_list_of_backends_says_that_cann_is_missing_and_how_to_switch_autoload_off(tmp_path: Path) -> None:
    script = "import sys; from polyaccel.cli.main import main; sys.exit(main(['backends', '--json']))"
    done = _without_cann(tmp_path, "-c", script)
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    assert rows["cpu"]["usable"]
    if rows["npu"]["usable"]:
        pytest.skip("CANN is installed on this machine")
    assert "CANN is missing or its set_env.sh was not sourced" in rows["npu"]["reason"]
    assert "libhccl.so" in rows["npu"]["reason"]
    assert f"{AUTOLOAD}=0" in rows["npu"]["reason"]


ANSWER = """
import sys
import polyaccel
with polyaccel.LLM(sys.argv[1], backend="auto") as llm:
    (answer,) = llm.generate(["The capital of France is"], polyaccel.SamplingParams(max_tokens=1, temperature=0.0))
print("torch_npu" in sys.modules, answer.text)
"""


@pytest.mark.model
def test_the_cpu_backend_answers(smollm2_path: Path, tmp_path: Path) -> None:
    done = _without_cann(tmp_path, "-c", ANSWER, str(smollm2_path))
    assert done.returncode == 0, done.stderr
    # On a machine with cards it is those that answer.
    assert done.stdout.split() in (["False", "Paris"], ["True", "Paris"])
