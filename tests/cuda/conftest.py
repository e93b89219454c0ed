"""Tests of the CUDA backend's kernels in Triton's interpreter: ``tox -e triton``."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("triton") is None:
        reason = "triton is not installed; run tox -e triton"
    elif os.environ.get("TRITON_INTERPRET") != "1":
        reason = "set TRITON_INTERPRET=1: kernels are interpreted here"
    else:
        return
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))
