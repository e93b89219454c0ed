"""The check of layers that are too large for the suite, on little ones, with the CPU backend."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from polyaccel.backend.cpu.backend import CpuBackend
from polyaccel_conformance.bench import Bench
from tests.support.large_layers import Found, enlarged, prove, rank_bench
from tests.support.thread_comm import ThreadCommunicator, ThreadGroup

STATIONS = {"q", "k", "v", "attention", "o", "o residual", "gate_up", "down", "down residual"}


@pytest.fixture(autouse=True)
def larger_families() -> Iterator[None]:
    with enlarged():
        yield


@pytest.mark.parametrize("phase", ["prefill", "decode", "mixed"])
@pytest.mark.parametrize("adapters", ["none", "all"])
def test_layers_are_judged_station_by_station(phase: str, adapters: str) -> None:
    found = prove(Bench(CpuBackend()), "little", phase, adapters)
    assert found.failure is None
    assert set(found.worst) == STATIONS
    assert 0.1 < max(found.worst.values()) <= 1.0


def test_a_wrong_layer_is_found() -> None:
    assert prove(Bench(CpuBackend()), "little", "decode", "all", wrong=True).failure is not None


def test_two_ranks_are_judged_together(tmp_path: Path) -> None:
    group, answers = ThreadGroup(2), dict[int, Found]()

    def run(rank: int) -> None:
        bench = rank_bench(Bench(CpuBackend()), ThreadCommunicator(group, rank), tmp_path)
        answers[rank] = prove(bench, "little", "mixed", "all")

    ranks = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join(60)
    assert sorted(answers) == [0, 1]
    for found in answers.values():
        assert found.failure is None
        assert set(found.worst) == STATIONS
