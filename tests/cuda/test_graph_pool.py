"""Memory of captured graphs: one pool for all that live at the same time, a new one once all have ended."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="run tox -e triton")

from polyaccel_cuda import graph, step
from polyaccel_cuda.backend import CudaBackend


class FakeGraph:
    def __init__(self, key: object, fn: object, ledger: object, pool: object, *told: object) -> None:
        self.pool, self.holds_memory = pool, False

    def capture(self, step: object) -> None:
        self.holds_memory = True

    def close(self) -> None:
        self.holds_memory = False


def test_graphs_share_a_pool_as_long_as_one_of_them_holds_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    handles = itertools.count(1)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
    monkeypatch.setattr(graph, "CudaGraph", FakeGraph)
    monkeypatch.setattr(step.CudaStep, "of", lambda operator, given: given)
    backend = CudaBackend()
    anything: Any = None

    def capture() -> Any:
        return backend.capture(anything, anything, anything)

    first, second = capture(), capture()
    assert first.pool == second.pool == 1
    first.close()
    third = capture()
    assert third.pool == 1
    second.close()
    third.close()
    fourth = capture()
    assert fourth.pool == 2
    del first, second, third, fourth
    assert capture().pool == 3
