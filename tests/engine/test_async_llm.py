"""``AsyncLLM``: many tasks on one engine, cancellation that aborts, errors that reach the task that caused them."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from polyaccel import AdapterNotFound, AsyncLLM, EngineDead, RequestRejected, SamplingParams
from tests.support.tiny_model import END_ID, TinyModel, random_prompts, scripted, settings

PROMPTS = random_prompts(8)
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
LONG = SamplingParams(temperature=0.0, seed=0, max_tokens=400, ignore_eos=True)


@contextmanager
def opened(tiny: TinyModel, **options: object) -> Iterator[AsyncLLM]:
    engine = AsyncLLM(tiny.folder, **settings(**options))
    try:
        yield engine
    finally:
        engine.close()


@pytest.fixture(scope="module")
def llm(tiny: TinyModel) -> Iterator[AsyncLLM]:
    with opened(tiny, adapters={"plain": tiny.adapter("plain").folder}) as engine:
        yield engine


@contextmanager
def slow(tiny: TinyModel, seconds: float = 0.05) -> Iterator[AsyncLLM]:
    """An engine that answers token 40 for ever, slowly."""
    with opened(tiny, backend=scripted({0: [40] * 500}, 2, latency=seconds)) as engine:
        yield engine


async def is_idle_soon(llm: AsyncLLM) -> bool:
    for _ in range(2000):
        health = llm.health()
        if (health.running, health.waiting) == (0, 0) and health.free_kv_blocks == health.kv_blocks:
            return True
        await asyncio.sleep(0.005)
    return False


def until(condition: Callable[[], bool]) -> asyncio.Future[None]:
    async def wait() -> None:
        while not condition():
            await asyncio.sleep(0.002)

    return asyncio.ensure_future(asyncio.wait_for(wait(), 20))


def test_it_takes_the_options_of_llm_and_closes_as_a_context_manager(tiny: TinyModel) -> None:
    async def main() -> None:
        backend = scripted({0: [40, 41]}, 2)
        async with AsyncLLM(tiny.folder, backend=backend, max_num_seqs=4, kv_cache_bytes=1 << 20) as llm:
            [completion] = await llm.generate([1, 2], SamplingParams(temperature=0.0, seed=0))
            assert completion.token_ids == (40, 41, END_ID)
            assert llm.explain().backend == "null"
        with pytest.raises(EngineDead, match="closed"):
            await llm.generate([1, 2])
        assert llm.health().status == "dead"

    before = set(threading.enumerate())
    asyncio.run(main())
    assert [thread.name for thread in set(threading.enumerate()) - before if "polyaccel" in thread.name] == []


def test_concurrent_tasks_each_get_their_own_answer(llm: AsyncLLM, tiny: TinyModel) -> None:
    async def main() -> list[tuple[int, ...]]:
        calls = [llm.generate(p, GREEDY, adapter="plain" if i % 2 else None) for i, p in enumerate(PROMPTS)]
        return [completions[0].token_ids for completions in await asyncio.gather(*calls)]

    expected = [tuple(tiny.greedy(p, 12, "plain" if i % 2 else None)) for i, p in enumerate(PROMPTS)]
    assert asyncio.run(main()) == expected


def test_choices_come_in_order(llm: AsyncLLM) -> None:
    params = SamplingParams(temperature=1.0, seed=3, n=4, max_tokens=6, ignore_eos=True)
    completions = asyncio.run(llm.generate(PROMPTS[0], params))
    assert [completion.index for completion in completions] == [0, 1, 2, 3]
    assert len({completion.token_ids for completion in completions}) == 4


def test_a_stream_adds_up_and_equals_generate(llm: AsyncLLM) -> None:
    async def main() -> None:
        deltas = [delta async for delta in llm.stream(PROMPTS[1], GREEDY, adapter="plain")]
        [whole] = await llm.generate(PROMPTS[1], GREEDY, adapter="plain")
        completion = deltas[-1].completion
        assert completion is not None
        assert "".join(delta.text for delta in deltas) == completion.text == whole.text
        assert completion.token_ids == whole.token_ids

    asyncio.run(main())


def test_stop_strings_end_a_generation(tiny: TinyModel) -> None:
    ids = tiny.tokenizer("sing the song")["input_ids"]
    with opened(tiny, backend=scripted({0: ids}, 2)) as llm:
        params = SamplingParams(temperature=0.0, seed=0, max_tokens=50, stop="the")
        [completion] = asyncio.run(llm.generate([1, 2], params))
    assert (completion.text, completion.stop_reason) == ("sing ", "the")


def test_conversations_go_through_the_template(llm: AsyncLLM, tiny: TinyModel) -> None:
    messages = [{"role": "user", "content": "the cat"}]
    text = tiny.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    expected = tiny.greedy(tiny.tokenizer(text)["input_ids"], 12)

    async def main() -> None:
        [completion] = await llm.chat(messages, GREEDY)
        deltas = [delta async for delta in llm.stream_chat(messages, GREEDY)]
        assert list(completion.token_ids) == [token for delta in deltas for token in delta.token_ids] == expected

    asyncio.run(main())


def test_cancelling_a_task_aborts_its_request_and_no_other(tiny: TinyModel) -> None:
    async def main(llm: AsyncLLM) -> None:
        tasks = [asyncio.create_task(llm.generate([1, 2], LONG)) for _ in range(2)]
        short = asyncio.create_task(llm.generate([1, 2], SamplingParams(temperature=0.0, seed=0, max_tokens=6)))
        await until(lambda: llm.health().running == 3)
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results)
        assert (await short)[0].token_ids == (40,) * 6
        assert await is_idle_soon(llm)

    with slow(tiny) as llm:
        asyncio.run(main(llm))


def test_a_task_cancelled_while_its_request_is_queued_leaves_nothing_behind(tiny: TinyModel) -> None:
    async def main(llm: AsyncLLM) -> None:
        running = asyncio.create_task(llm.generate([1, 2], LONG))
        await until(lambda: llm.health().running == 1)
        # The engine's thread is inside a slow step, so that this one's submission is under way.
        late = asyncio.create_task(llm.generate([1, 2], LONG))
        await asyncio.sleep(0.01)
        late.cancel()
        running.cancel()
        await asyncio.gather(late, running, return_exceptions=True)
        assert await is_idle_soon(llm)

    with slow(tiny, 0.2) as llm:
        asyncio.run(main(llm))


def test_leaving_a_stream_early_aborts_it(tiny: TinyModel) -> None:
    async def main(llm: AsyncLLM) -> None:
        stream = llm.stream([1, 2], LONG)
        async for delta in stream:
            assert delta.token_ids == (40,)
            break
        await stream.aclose()
        assert await is_idle_soon(llm)

    with slow(tiny) as llm:
        asyncio.run(main(llm))


def test_an_event_loop_that_ends_with_open_requests_harms_nobody(tiny: TinyModel) -> None:
    async def give_up(llm: AsyncLLM) -> None:
        tasks = [asyncio.create_task(llm.generate([1, 2], LONG)) for _ in range(3)]
        await until(lambda: llm.health().running == 3)
        assert not any(task.done() for task in tasks)

    with slow(tiny, 0.01) as llm:
        asyncio.run(give_up(llm))
        [completion] = asyncio.run(llm.generate([1, 2], SamplingParams(temperature=0.0, seed=0, max_tokens=3)))
        assert completion.token_ids == (40,) * 3
        assert asyncio.run(is_idle_soon(llm))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_receiver_whose_loop_is_gone_does_not_stop_the_engine(tiny: TinyModel) -> None:
    with slow(tiny, 0.01) as llm:
        loop = asyncio.new_event_loop()
        task = loop.create_task(llm.generate([1, 2], SamplingParams(temperature=0.0, seed=0, max_tokens=20)))
        loop.run_until_complete(asyncio.sleep(0.05))
        # Closed under the running task: nothing aborts the request, its events have nowhere to go.
        loop.close()
        [completion] = asyncio.run(llm.generate([1, 2], SamplingParams(temperature=0.0, seed=0, max_tokens=3)))
        assert completion.token_ids == (40,) * 3
        assert llm.health().status == "ok"
        assert asyncio.run(is_idle_soon(llm))
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        del task
        gc.collect()


def test_many_tasks_with_many_cancellations_leave_nothing_behind(tiny: TinyModel) -> None:
    async def main(llm: AsyncLLM) -> None:
        params = SamplingParams(temperature=0.0, seed=0, max_tokens=30)
        tasks = [asyncio.create_task(llm.generate([1, 2], params)) for _ in range(200)]
        await asyncio.sleep(0.02)
        for task in tasks[::2]:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        finished = [result for result in results[1::2] if not isinstance(result, BaseException)]
        assert [completions[0].token_ids for completions in finished] == [(40,) * 30] * 100
        assert await is_idle_soon(llm)

    with slow(tiny, 0.001) as llm:
        asyncio.run(main(llm))


def test_errors_are_raised_in_the_task_that_caused_them(llm: AsyncLLM, tiny: TinyModel) -> None:
    async def main() -> None:
        results = await asyncio.gather(
            llm.generate(PROMPTS[0], GREEDY),
            llm.generate([], GREEDY),
            llm.generate(PROMPTS[0], GREEDY, adapter="nobody"),
            llm.generate([10**6], GREEDY),
            return_exceptions=True,
        )
        assert not isinstance(results[0], BaseException)
        assert list(results[0][0].token_ids) == tiny.greedy(PROMPTS[0], 12)
        assert [type(result) for result in results[1:]] == [RequestRejected, AdapterNotFound, RequestRejected]

    asyncio.run(main())


def test_adapters_are_loaded_from_a_thread_while_tasks_run(tiny: TinyModel) -> None:
    async def main(llm: AsyncLLM) -> None:
        running = asyncio.create_task(llm.generate(PROMPTS[0], SamplingParams(temperature=0.0, max_tokens=60)))
        await asyncio.to_thread(llm.adapters.load, "rslora", tiny.adapter("rslora").folder)
        [completion] = await llm.generate(PROMPTS[0], GREEDY, adapter="rslora")
        assert list(completion.token_ids) == tiny.greedy(PROMPTS[0], 12, "rslora")
        await running

    with opened(tiny) as llm:
        asyncio.run(main(llm))


def test_closing_the_engine_ends_waiting_tasks(tiny: TinyModel) -> None:
    async def main(llm: AsyncLLM) -> None:
        task = asyncio.create_task(llm.generate([1, 2], LONG))
        await until(lambda: llm.health().running == 1)
        await asyncio.to_thread(llm.close)
        [completion] = await task
        assert completion.finish_reason == "abort"

    with slow(tiny) as llm:
        asyncio.run(main(llm))
