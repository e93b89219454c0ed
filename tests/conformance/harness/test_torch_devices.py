"""Instruments of a device that torch has a module for: what the module lacks is named, what it has is used."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from polyaccel.backend import TorchDevice
from polyaccel_conformance.harness.torch_devices import TorchInstruments


class Module:
    """A vendor's module with two devices; like torch_npu's, setting a limit leaves the device current."""

    def __init__(self) -> None:
        self.now, self.limits = 0, dict[int, float]()

    def current_device(self) -> int:
        return self.now

    @contextlib.contextmanager
    def device(self, where: torch.device) -> Iterator[None]:
        before, self.now = self.now, where.index
        yield
        self.now = before

    def memory_allocated(self, where: torch.device) -> int:
        return 100 + where.index

    def memory_stats(self, where: torch.device) -> dict[str, int]:
        return {"allocated_bytes.all.allocated": 200 + where.index}

    def empty_cache(self) -> None:
        self.now = 0

    def set_per_process_memory_fraction(self, fraction: float, where: torch.device) -> None:
        self.now = 0
        self.limits[where.index] = fraction


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Module:
    found = Module()
    monkeypatch.setattr(torch, "xpu", found)
    return found


def devices() -> list[TorchDevice]:
    return [TorchDevice("xpu:0"), TorchDevice("xpu:1")]


def test_a_module_is_asked_for_the_current_device_and_for_memory(module: Module) -> None:
    first, second = devices()
    tools = TorchInstruments(first, [first, second])
    assert tools.other is second
    assert not any(tools.lacks(what) for what in ("devices", "memory", "exhaustion"))
    with tools.use(second):
        assert tools.current() == 1
    assert tools.current() == 0
    assert (tools.allocated(second), tools.ever_allocated(second)) == (101, 201)


def test_a_device_without_memory_leaves_the_current_one_as_it_was(module: Module) -> None:
    first, second = devices()
    tools = TorchInstruments(first, [first, second])
    with tools.use(second):
        with tools.exhausted(first):
            assert (module.limits, tools.current()) == ({0: 0.0}, 1)
        assert (module.limits, tools.current()) == ({0: 1.0}, 1)


def test_what_a_module_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = devices()
    monkeypatch.setattr(torch, "xpu", SimpleNamespace(current_device=lambda: 0))
    tools = TorchInstruments(first, [first, second])
    assert tools.lacks("devices") == "torch.xpu has no device"
    assert tools.lacks("memory") == "torch.xpu has no memory_allocated"
    assert "offers the harness no streams" in tools.lacks("streams")


def test_one_device_alone_has_no_other_to_be_current(module: Module) -> None:
    (first, _) = devices()
    assert TorchInstruments(first, [first]).lacks("devices") == "the backend has one device, xpu:0"
