"""Tests of the NPU backend: the same on a card and on simulated ones (``tox -e npu-sim``)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from polyaccel_npu.backend import NpuBackend
    from polyaccel_npu.device import NpuDevice

PURE = ("test_errors", "test_attention_plan", "test_fused_rules", "test_journal", "test_probe", "test_health")
"""Modules that need no device."""


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "hardware: runs on a card, or on a simulated one, unchanged")


def _unusable() -> str:
    if importlib.util.find_spec("torch_npu") is None:
        return "torch_npu is not installed; run tox -e npu-sim"
    from polyaccel_npu.probe import probe

    found = probe()
    return "" if found.usable else found.reason


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    own = [item for item in items if here in item.path.parents and item.path.stem not in PURE]
    reason = _unusable() if own else ""
    for item in own:
        item.add_marker(pytest.mark.hardware)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def backend() -> NpuBackend:
    from polyaccel_npu.backend import NpuBackend

    return NpuBackend()


@pytest.fixture
def device(backend: NpuBackend) -> NpuDevice:
    from polyaccel_npu.device import NpuDevice

    found = backend.devices()[0]
    assert isinstance(found, NpuDevice)
    return found
