"""One forkserver for all pools of ranks of these tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from polyaccel_conformance.workers.process import ForkServer


@pytest.fixture(scope="session")
def server() -> Iterator[ForkServer]:
    server = ForkServer()
    yield server
    server.close()
