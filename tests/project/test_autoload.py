"""``import polyaccel`` before torch keeps torch usable where torch_npu is installed without CANN."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.project.source import ROOT

AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
VENDOR = "raise ImportError('libhccl.so: cannot open shared object file: No such file or directory')\n"
POINT = "[torch.backends]\ntorch_npu = torch_npu:_autoload\n"


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with a torch_npu that cannot be imported, installed as the real one is."""
    (tmp_path / "torch_npu").mkdir()
    (tmp_path / "torch_npu" / "__init__.py").write_text(VENDOR, encoding="utf-8")
    info = tmp_path / "torch_npu-2.13.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch_npu\nVersion: 2.13.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(POINT, encoding="utf-8")
    return tmp_path


def _python(site: Path, program: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in (AUTOLOAD, "LD_LIBRARY_PATH")}
    environment |= {"PYTHONPATH": os.pathsep.join((str(site), str(ROOT)))} | variables
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)


def test_without_polyaccel_torch_cannot_be_imported(site: Path) -> None:
    assert AUTOLOAD in _python(site, "import torch").stderr


def test_with_polyaccel_first_torch_and_the_cpu_backend_can(site: Path) -> None:
    program = "import polyaccel, torch\nfrom polyaccel.backend.registry import load\nprint(load('cpu').probe().usable)"
    done = _python(site, program)
    assert (done.returncode, done.stdout.strip()) == (0, "True"), done.stderr


def test_processes_started_from_there_can_too(site: Path) -> None:
    program = "import polyaccel, subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', 'import torch']))"
    assert _python(site, program).returncode == 0


def test_what_the_user_has_set_is_left_alone(site: Path) -> None:
    program = f"import polyaccel, os; print(os.environ[{AUTOLOAD!r}])"
    assert _python(site, program, **{AUTOLOAD: "1"}).stdout.strip() == "1"


def test_nothing_is_set_where_torch_npu_is_not_installed(tmp_path: Path) -> None:
    program = (
        "import importlib.machinery as m, os, sys\n"
        "sys.path[:] = [p for p in sys.path if m.PathFinder.find_spec('torch_npu', [p]) is None]\n"
        f"import polyaccel; print({AUTOLOAD!r} in os.environ, 'ctypes' in sys.modules)"
    )
    assert _python(tmp_path, program).stdout.split() == ["False", "False"]


def test_nothing_is_set_where_the_library_of_cann_is_found(site: Path) -> None:
    program = (
        "import ctypes\n"
        "asked = []\n"
        "ctypes.CDLL = asked.append\n"
        f"import os, polyaccel; print({AUTOLOAD!r} in os.environ, *asked)"
    )
    assert _python(site, program).stdout.split() == ["False", "libhccl.so"]
