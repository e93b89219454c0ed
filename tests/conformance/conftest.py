"""Long tests of the suite run on request only, so that the others can run on every change."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

LONG = "POLYACCEL_LONG_TESTS"
# They start workers, build wheels and run whole profiles.
FOLDERS = ("backends", "certificate", "cli", "models", "multi", "mutants", "mutation", "report", "runner", "template")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get(LONG):
        return
    here = Path(__file__).parent
    for item in items:
        if here not in item.path.parents:
            continue
        folder = item.path.relative_to(here).parts[0]
        if folder in FOLDERS or item.get_closest_marker("slow") is not None:
            item.add_marker(pytest.mark.skip(reason=f"takes minutes; set {LONG}=1"))
