"""The engine on ranks that were forked: it asks, closes and dies as on those that it starts itself."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import closing

import pytest

from polyaccel import LLM
from polyaccel.backend.errors import EngineDead
from polyaccel.engine.process_executor import ProcessExecutor
from polyaccel_conformance.models.answers import ask
from polyaccel_conformance.models.engines import GREEDY, Workshop
from polyaccel_conformance.models.forked_ranks import ForkedRank, forked_ranks
from polyaccel_conformance.models.variations import BASE
from polyaccel_conformance.workers.process import ForkServer


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    with closing(ForkServer()) as found:
        yield found


@pytest.fixture(scope="module")
def shop() -> Iterator[Workshop]:
    with Workshop() as made:
        yield made


def test_they_give_the_bits_of_ranks_that_were_started_afresh(server: ForkServer, shop: Workshop) -> None:
    def answers() -> object:
        with shop.open("llama", "cpu", tensor_parallel_size=2) as llm:
            return ask(llm, shop.prompts("llama"), BASE, GREEDY)

    with forked_ranks(server):
        forked = answers()
    assert forked == answers()


def test_none_is_left_when_the_engine_is_closed(server: ForkServer, shop: Workshop) -> None:
    with forked_ranks(server), shop.open("llama", "cpu", tensor_parallel_size=2) as llm:
        ranks = _ranks(llm)
        assert all(isinstance(rank, ForkedRank) and rank.alive() for rank in ranks)
    assert not any(rank.alive() for rank in ranks)


def test_the_death_of_one_ends_the_engine_and_is_named(server: ForkServer, shop: Workshop) -> None:
    with forked_ranks(server), shop.open("llama", "cpu", tensor_parallel_size=2) as llm:
        os.kill(_ranks(llm)[1].pid, signal.SIGKILL)
        with pytest.raises(EngineDead, match=r"rank 1.*was killed by signal 9"):
            ask(llm, shop.prompts("llama"), BASE, GREEDY)


def _ranks(llm: LLM) -> list[ForkedRank]:
    executor = llm.engine.executor
    assert isinstance(executor, ProcessExecutor)
    return executor._workers  # type: ignore[return-value]
