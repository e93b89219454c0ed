"""A request's tokens depend on nothing but the request: batch mates, chunks, cached prefixes, overlap, preemption."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from polyaccel import LLM, SamplingParams
from tests.support.tiny_model import BLOCK_BYTES, TinyModel, random_prompts

COUNT = 16
Answer = tuple[tuple[int, ...], ...]
ADAPTERS = ("plain", "patterns", "ends")


@dataclass(frozen=True)
class Asked:
    """One request of the workload."""

    prompt: list[int]
    params: SamplingParams
    adapter: str | dict[str, float] | None = None


def workload() -> list[Asked]:
    """Greedy and seeded requests with and without adapters; half of the prompts begin alike."""
    shared = random_prompts(1, seed=5, low=40, high=40)[0]
    own = random_prompts(10, seed=6)
    prompts = [shared + tail if i % 2 else tail for i, tail in enumerate(own)]
    mixes: list[str | dict[str, float] | None] = [None, "plain", {"plain": 0.5, "ends": -1.0}, None, "patterns"]
    asked = []
    for i, prompt in enumerate(prompts):
        options: dict[str, Any] = {"max_tokens": COUNT, "ignore_eos": True, "temperature": 0.0, "seed": i}
        if i % 3 == 1:
            options |= {"temperature": 1.0, "top_p": 0.9, "n": 2}
        if i % 3 == 2:
            options |= {"temperature": 0.8, "repetition_penalty": 1.3, "frequency_penalty": 0.4}
        asked.append(Asked(prompt, SamplingParams(**options), mixes[i % len(mixes)]))
    return asked


WORKLOAD = workload()


def together(llm: LLM, requests: Sequence[Asked] = WORKLOAD) -> list[Answer]:
    completions = iter(
        llm.generate([r.prompt for r in requests], [r.params for r in requests], adapter=[r.adapter for r in requests])
    )
    return [tuple(next(completions).token_ids for _ in range(request.params.n)) for request in requests]


def opened(tiny: TinyModel, **options: Any) -> LLM:
    return tiny.open(adapters={name: tiny.adapter(name).folder for name in ADAPTERS}, **options)


@pytest.fixture(scope="module")
def alone(tiny: TinyModel) -> list[Answer]:
    """Every request by itself: whole prompts, nothing cached, no overlap."""
    with opened(tiny, prefix_caching=False, overlap=False) as llm:
        answers = [together(llm, [request])[0] for request in WORKLOAD]
    for request, answer in zip(WORKLOAD, answers, strict=True):
        if request.params.temperature == 0.0:
            assert list(answer[0]) == tiny.greedy(request.prompt, COUNT, request.adapter)
    assert len(set(answers)) == len(answers)
    return answers


@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "no overlap"])
@pytest.mark.parametrize("budget", [8, 13, 64, 512])
def test_tokens_do_not_depend_on_batch_mates_chunks_or_overlap(
    tiny: TinyModel, alone: list[Answer], budget: int, overlap: bool
) -> None:
    with opened(tiny, max_batched_tokens=budget, overlap=overlap) as llm:
        assert together(llm) == alone
        assert together(llm, WORKLOAD[::-1]) == alone[::-1]


def test_tokens_do_not_depend_on_prefix_cache_hits(tiny: TinyModel, alone: list[Answer]) -> None:
    with opened(tiny) as llm:
        for _ in range(3):
            assert together(llm) == alone
        assert llm.engine.loop.stats().prefix_hits > 0
        completions = llm.generate([r.prompt for r in WORKLOAD], adapter=[r.adapter for r in WORKLOAD])
        assert sum(completion.cached_tokens for completion in completions) > 0


@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "no overlap"])
@pytest.mark.parametrize("caching", [True, False], ids=["prefix cache", "no prefix cache"])
def test_tokens_do_not_depend_on_preemption(tiny: TinyModel, alone: list[Answer], overlap: bool, caching: bool) -> None:
    with opened(tiny, kv_cache_bytes=14 * BLOCK_BYTES, overlap=overlap, prefix_caching=caching) as llm:
        assert together(llm) == alone
        assert llm.engine.loop.stats().preemptions > 0
        health = llm.health()
        assert health.free_kv_blocks == health.kv_blocks == 14


def test_tokens_do_not_depend_on_how_requests_arrive(tiny: TinyModel, alone: list[Answer]) -> None:
    with opened(tiny, max_num_seqs=3, max_batched_tokens=20) as llm:
        streams = [llm.stream(r.prompt, r.params, adapter=r.adapter) for r in WORKLOAD]
        for request, stream, expected in zip(WORKLOAD, streams, alone, strict=True):
            output: list[list[int]] = [[] for _ in range(request.params.n)]
            for delta in stream:
                output[delta.index] += delta.token_ids
            assert tuple(tuple(ids) for ids in output) == expected


# A decoding sequence whose blocks have another's between them once read that one too (budget 13).
@pytest.mark.parametrize("caching", [True, False], ids=["prefix cache", "no prefix cache"])
@pytest.mark.parametrize("budget", [8, 13, 512])
def test_tokens_do_not_depend_on_anything_on_the_cpu_backend_either(
    tiny: TinyModel, alone: list[Answer], budget: int, caching: bool
) -> None:
    with opened(tiny, backend="cpu", executor="inline", max_batched_tokens=budget, prefix_caching=caching) as llm:
        assert together(llm) == alone
        assert together(llm, WORKLOAD[::-1]) == alone[::-1]


def test_tokens_do_not_depend_on_the_executor(tiny: TinyModel, alone: list[Answer]) -> None:
    folders = {name: tiny.adapter(name).folder for name in ADAPTERS}
    with tiny.open_workers(adapters=folders, max_batched_tokens=32) as llm:
        assert together(llm) == alone
