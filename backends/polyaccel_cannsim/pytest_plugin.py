"""``pytest -p polyaccel_cannsim.pytest_plugin``: simulated cards in the test process."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from .process import current, install

if TYPE_CHECKING:
    from .ledger import Ledger
    from .simulator import Simulator


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("cannsim", "simulated Ascend cards")
    group.addoption("--cannsim-devices", help="number of cards; default: CANNSIM_DEVICES, else 8")
    group.addoption("--cannsim-soc", help="910B, A3, 310P or a SoC name")
    group.addoption("--cannsim-cann", help="CANN version")


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config, parser: pytest.Parser, args: list[str]) -> None:
    """Before any conftest imports torch, which would load torch_npu without CANN."""
    known = early_config.known_args_namespace
    devices = known.cannsim_devices
    install(devices=int(devices) if devices else None, soc=known.cannsim_soc, cann=known.cannsim_cann)


def pytest_report_header(config: pytest.Config) -> str:
    settings = current().settings
    return (
        f"cannsim: {settings.devices} x {settings.soc.name}, CANN {settings.cann} (simulated: no kernel of a card runs)"
    )


@pytest.fixture
def cannsim() -> Simulator:
    """The simulated machine of this process."""
    return current()


@pytest.fixture
def cann_ledger() -> Ledger:
    """The ledger, empty at the test's start."""
    ledger = current().ledger
    ledger.reset()
    return ledger
