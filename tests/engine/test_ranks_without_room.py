"""Memory runs out on one of several ranks: at load a typed error that names it, in a step no answer is lost."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from polyaccel import LLM, EngineDead, OutOfMemory, SamplingParams, WorkerError
from tests.support.processes import children, wait_gone
from tests.support.short_of_memory import MESSAGE, Shortage, install
from tests.support.tiny_model import BLOCK_BYTES, LAYERS, TinyModel

PROMPTS = [list(range(3, 3 + length)) for length in (40, 4, 9, 1, 13)]
COUNT = 6
GREEDY = SamplingParams(temperature=0.0, max_tokens=COUNT, ignore_eos=True)
SECONDS = 20.0
"""Far below the engine's timeout, which would end a collective that waits for ever."""
OPERATORS = 3 * LAYERS + 2
"""Called at least in a step."""


@pytest.fixture
def short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Shortage], str]:
    return install(tmp_path, monkeypatch)


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    before = children()
    begun = time.monotonic()
    yield
    assert children() == before
    assert time.monotonic() - begun < 3 * SECONDS, "a rank waited for another"


def expected(tiny: TinyModel) -> list[list[int]]:
    return [tiny.greedy(prompt, COUNT) for prompt in PROMPTS]


def answers(llm: LLM) -> list[list[int]]:
    return [list(completion.token_ids) for completion in llm.generate(PROMPTS, GREEDY)]


# -- at load -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("stage", "what", "advice"),
    [
        ("weights", "its weights", "smaller dtype"),
        ("kv", "a KV cache of 192 blocks of", "kv_cache_bytes"),
        ("adapters", "8 adapters of 512 rank rows", "adapter_rank_rows"),
        ("sampling", "the state of sampling", "max_num_seqs"),
    ],
)
def test_a_rank_that_finds_no_room_while_loading_is_named_with_what_it_lacked(
    tiny: TinyModel, short: Callable[[Shortage], str], rank: int, stage: str, what: str, advice: str
) -> None:
    with tiny.open() as other:
        begun = time.monotonic()
        with pytest.raises(OutOfMemory) as caught:
            tiny.open_workers(2, backend=short(Shortage(ranks=(rank,), stage=stage)))
        assert time.monotonic() - begun < SECONDS
        assert answers(other) == expected(tiny)
    text = str(caught.value)
    assert text.startswith(f"rank {rank} of 2 on cpu has no room for ")
    for part in (what, MESSAGE, advice):
        assert part in text
    cause = caught.value.__cause__
    assert isinstance(cause, WorkerError)
    assert cause.rank == rank
    assert "Traceback (most recent call last)" in cause.traceback_text


@pytest.mark.parametrize("rank", [0, 2])
def test_a_rank_beyond_its_budget_is_named_with_the_figures(
    tiny: TinyModel, short: Callable[[Shortage], str], rank: int
) -> None:
    options = {"memory_fraction": 0.5, "kv_cache_bytes": None}
    with pytest.raises(OutOfMemory) as caught:
        tiny.open_workers(3, backend=short(Shortage(ranks=(rank,), free=3000)), **options)
    text = str(caught.value)
    assert f"rank {rank} of 3 on cpu" in text
    assert "3000 bytes are free, memory_fraction=0.5 leaves 500 of them" in text
    assert f"and a block takes {BLOCK_BYTES * 2 // 3}" in text
    assert "raise memory_fraction" in text
    assert isinstance(caught.value.__cause__, WorkerError)
    assert caught.value.__cause__.rank == rank


def test_the_smallest_budget_of_a_rank_is_what_all_go_by(tiny: TinyModel, short: Callable[[Shortage], str]) -> None:
    # Of two ranks on one host, each takes half of the budget; the second holds one KV head of three.
    block = 2 * BLOCK_BYTES // 3
    options = {"memory_fraction": 0.5, "kv_cache_bytes": None}
    with tiny.open_workers(2, backend=short(Shortage(ranks=(1,), free=4 * 5 * block)), **options) as llm:
        assert llm.engine.executor.capacity.kv_blocks == 5
        assert answers(llm) == expected(tiny)


# -- in a step ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize(
    ("world", "ranks", "at"),
    [
        (2, (1,), 0),
        (2, (0,), OPERATORS // 2),
        (2, (0, 1), 1),
        # The others have done all of the step.
        (3, (1,), "sample"),
        (4, (2,), OPERATORS // 2),
    ],
    ids=str,
)
def test_steps_that_find_no_room_on_a_rank_are_done_again_in_smaller_ones_with_the_same_tokens(
    tiny: TinyModel, short: Callable[[Shortage], str], world: int, ranks: tuple[int, ...], at: int | str, overlap: bool
) -> None:
    backend = short(Shortage(ranks=ranks, stage="step", at=at, tokens=12))
    with tiny.open_workers(world, backend=backend, overlap=overlap) as llm:
        assert answers(llm) == expected(tiny)
        assert llm.health().status == "ok"
        assert llm.health().no_room > 0
        assert answers(llm) == expected(tiny)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_request_of_which_no_token_fits_on_a_rank_ends_alone(
    tiny: TinyModel, short: Callable[[Shortage], str], rank: int
) -> None:
    backend = short(Shortage(ranks=(rank,), stage="step", at=3, context=30))
    with tiny.open_workers(2, backend=backend) as llm:
        streams = [llm.stream(prompt, GREEDY) for prompt in PROMPTS]
        with pytest.raises(OutOfMemory, match=f"rank {rank} of 2 on cpu: .*{MESSAGE}.*memory_fraction"):
            list(streams[0])
        for prompt, stream in zip(PROMPTS[1:], streams[1:], strict=True):
            assert [token for delta in stream for token in delta.token_ids] == tiny.greedy(prompt, COUNT)
        assert llm.health().status == "ok"


def test_sampled_tokens_adapters_and_traces_outlive_a_step_without_room(
    tiny: TinyModel, short: Callable[[Shortage], str]
) -> None:
    params = SamplingParams(temperature=1.0, seed=3, repetition_penalty=1.3, max_tokens=12, ignore_eos=True)
    adapters = {"plain": tiny.adapter("plain").folder}
    names = [None, "plain", None, "plain", "plain"]
    with tiny.open(adapters=adapters) as alone:
        wanted = [completion.token_ids for completion in alone.generate(PROMPTS, params, adapter=names)]
    backend = short(Shortage(ranks=(1,), stage="step", at=4, tokens=2, times=7))
    with tiny.open_workers(2, backend=backend, adapters=adapters, trace_collectives=True) as llm:
        found = [completion.token_ids for completion in llm.generate(PROMPTS, params, adapter=names)]
        assert found == wanted
        assert llm.health().no_room > 0
        llm.adapters.load("ends", tiny.adapter("ends").folder)
        llm.engine.loop.call(llm.engine.executor.collectives)
        llm.generate(PROMPTS[1], GREEDY, adapter="ends")
        traces = llm.engine.loop.call(llm.engine.executor.collectives)
        assert traces[0] == traces[1] != []


def test_an_engine_whose_ranks_have_parted_answers_questions_and_closes(
    tiny: TinyModel, short: Callable[[Shortage], str]
) -> None:
    backend = short(Shortage(ranks=(1,), stage="step", at="sample"))
    with tiny.open_workers(2, backend=backend) as llm:
        with pytest.raises(OutOfMemory, match="rank 1 of 2"):
            llm.generate(PROMPTS[1], GREEDY)
        assert len(llm.explain().ranks) == 2
        llm.adapters.load("plain", tiny.adapter("plain").folder)
        with pytest.raises(OutOfMemory, match="rank 1 of 2"):
            llm.generate(PROMPTS[1], GREEDY, adapter="plain")


def test_a_rank_killed_after_a_step_without_room_is_blamed(tiny: TinyModel, short: Callable[[Shortage], str]) -> None:
    backend = short(Shortage(ranks=(0,), stage="step", tokens=20, at=2))
    with tiny.open_workers(2, backend=backend) as llm:
        assert answers(llm) == expected(tiny)
        workers = llm.engine.executor.worker_pids()  # type: ignore[attr-defined]
        stream = llm.stream(PROMPTS[0], SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True))
        next(stream)
        os.kill(workers[1], signal.SIGKILL)
        with pytest.raises(EngineDead, match="rank 1: was killed by SIGKILL"):
            list(stream)
        assert wait_gone(workers)


def test_a_group_that_finds_no_room_to_meet_again_ends_the_engine_with_the_cause(
    tiny: TinyModel, short: Callable[[Shortage], str]
) -> None:
    backend = short(Shortage(ranks=(1,), stage="step+connect", tokens=20, at=2))
    with tiny.open_workers(2, backend=backend) as llm:
        with pytest.raises(EngineDead, match="rank 1 of 2 on cpu has no room for the connections") as caught:
            answers(llm)
        cause = caught.value.__cause__
        assert isinstance(cause, WorkerError)
        assert isinstance(cause.__cause__, OutOfMemory)
        assert llm.health().status == "dead"
