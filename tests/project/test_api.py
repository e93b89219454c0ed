"""The public names and signatures are the stored ones: every change to them is deliberate."""

from __future__ import annotations

import importlib
import inspect

import pytest

from tests.project.api import render
from tests.project.source import ROOT, compare_with_stored

SNAPSHOTS = {"polyaccel": "api_snapshot.txt", "polyaccel.backend": "contract_snapshot.txt"}


@pytest.mark.parametrize("package", SNAPSHOTS)
def test_the_public_api_is_the_stored_one(package: str) -> None:
    path = ROOT / "tests" / "project" / SNAPSHOTS[package]
    actual = render(importlib.import_module(package))
    compare_with_stored(path, actual, path.read_text(encoding="utf-8") if path.exists() else "", actual)


@pytest.mark.parametrize("package", SNAPSHOTS)
def test_public_names_are_sorted_unique_and_documented(package: str) -> None:
    module = importlib.import_module(package)
    assert sorted(set(module.__all__)) == sorted(module.__all__), "a name twice in __all__"
    public = [(name, getattr(module, name)) for name in module.__all__]
    written = [(name, value) for name, value in public if inspect.isclass(value) or inspect.isfunction(value)]
    # A dataclass without a docstring gets one that repeats its signature.
    missing = [name for name, value in written if not value.__doc__ or value.__doc__.startswith(f"{name}(")]
    assert missing == []
