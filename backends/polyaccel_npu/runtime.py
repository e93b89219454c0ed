"""torch_npu, imported when it is first needed and nowhere else."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch

AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
"""Where torch looks for device packages to import by itself; 0 switches that off."""


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


def ops() -> Any:
    """torch_npu's own operators, ``torch.ops.npu``."""
    npu()
    return torch.ops.npu
