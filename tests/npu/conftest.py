"""Tests of the NPU backend: the same on a card and on simulated ones (``tox -e npu-sim``)."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from polyaccel_npu.backend import NpuBackend
    from polyaccel_npu.device import NpuDevice

PURE = (
    "test_errors",
    "test_attention_plan",
    "test_cann",
    "test_fused_rules",
    "test_journal",
    "test_probe",
    "test_health",
    "test_import_safety",
)
"""Modules that need no device."""
LONG = "POLYACCEL_LONG_TESTS"
LONG_CASES = (
    "test_one_card_answers_with_the_cpu_backends_tokens[bfloat16]",
    "test_several_cards_answer_with_the_cpu_backends_tokens[3]",
    "test_several_cards_answer_with_the_cpu_backends_tokens[4]",
    "test_replayed_steps_answer_as_those_that_run_call_by_call[2]",
)
"""What takes a minute or more on two cores; the others of its module ask the same of less."""


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
        elif not os.environ.get(LONG) and item.name in LONG_CASES:
            item.add_marker(pytest.mark.skip(reason=f"takes minutes; set {LONG}=1"))


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
