"""Other projects' packages as fakes: the same signatures and roundings, on the CPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

FAKES = Path(__file__).with_name("fakes")
PACKAGES = ("liger_kernel", "flag_gems", "vllm")


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Importable for one test."""
    monkeypatch.syspath_prepend(str(FAKES))
    yield FAKES
    for name in [name for name in sys.modules if name.split(".")[0] in PACKAGES]:
        # A library of torch operators cannot be registered twice.
        if not name.startswith("vllm"):
            del sys.modules[name]
