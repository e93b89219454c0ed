"""Long tests of the suite run on request only."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

LONG = "POLYACCEL_LONG_TESTS"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get(LONG):
        return
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents and item.get_closest_marker("slow") is not None:
            item.add_marker(pytest.mark.skip(reason=f"takes minutes; set {LONG}=1"))
