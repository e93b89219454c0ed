"""Importing is safe without CANN, and what is missing is said in words."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from polyaccel.backend.errors import BackendUnavailable
from polyaccel_npu import runtime
from polyaccel_npu.backend import NpuBackend
from polyaccel_npu.probe import available, unusable


def test_nothing_of_torch_npu_is_imported_by_the_package_or_by_opening_the_backend() -> None:
    script = (
        "import polyaccel, sys\n"
        "from polyaccel_npu.backend import NpuBackend\n"
        "NpuBackend()\n"
        "from polyaccel.backend.cpu.backend import CpuBackend\n"
        "CpuBackend().devices()\n"
        "sys.exit('torch_npu' in sys.modules)\n"
    )
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    environment.pop("LD_LIBRARY_PATH", None)
    child = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr


def test_a_missing_cann_is_named_with_the_way_to_switch_autoload_off() -> None:
    found = unusable("ImportError: libhccl.so: cannot open shared object file: No such file or directory", False)
    assert not found.usable
    assert not found.hardware
    assert "CANN is missing" in found.reason
    assert "libhccl.so" in found.reason
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in found.reason


def test_a_missing_driver_is_named() -> None:
    assert "driver" in unusable("ImportError: libascend_hal.so: cannot open shared object file", True).reason


def test_hardware_without_devices_is_not_passed_over() -> None:
    found = available((), True)
    assert (found.usable, found.hardware) == (False, True)


def test_devices_of_a_known_chip_are_usable() -> None:
    assert available(("Ascend910B3",), True).usable
    assert not available(("Ascend910B3", "Something"), True).usable


def test_devices_say_what_is_missing_where_there_is_no_torch_npu() -> None:
    if runtime.installed():
        pytest.skip("torch_npu is installed here")
    with pytest.raises(BackendUnavailable, match="torch_npu is not installed: python -m pip install"):
        NpuBackend().devices()
