"""torch_npu, imported when it is first needed and nowhere else."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
from typing import Any

import torch

AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
"""Where torch looks for device packages to import by itself; 0 switches that off."""


SIMULATOR = "cannsim_last_error"


def installed() -> bool:
    """Whether torch_npu is installed; imports nothing."""
    return importlib.util.find_spec("torch_npu") is not None


def npu() -> Any:
    """The module ``torch.npu``.

    Raises:
        ImportError: torch_npu, or a library of CANN that it links to, is missing.
    """
    importlib.import_module("torch_npu")
    return torch.npu  # type: ignore[attr-defined]


def simulated() -> bool:
    """Whether the libraries behind torch_npu are no CANN but its simulator, by a symbol that only that one has. Nothing
    but what is said of results depends on it."""
    if not installed():
        return False
    try:
        npu()
    except (ImportError, OSError, RuntimeError):
        return False
    return hasattr(ctypes.CDLL(None), SIMULATOR)


def ops() -> Any:
    """torch_npu's own operators, ``torch.ops.npu``."""
    npu()
    return torch.ops.npu
