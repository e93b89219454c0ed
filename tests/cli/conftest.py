"""An engine that answers what the commands are expected to print."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.cli.console import KV_CACHE_BYTES

if TYPE_CHECKING:
    from polyaccel import LLM
    from tests.support.tiny_model import TinyModel


@pytest.fixture(scope="module")
def llm(tiny: TinyModel) -> Iterator[LLM]:
    """The engine that :data:`tests.cli.console.ENGINE` names, with two adapters."""
    adapters = {name: tiny.adapter(name).folder for name in ("plain", "rslora")}
    with tiny.open(backend="cpu", kv_cache_bytes=KV_CACHE_BYTES, threads=1, adapters=adapters) as opened:
        yield opened
