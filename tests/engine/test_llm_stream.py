"""``LLM.stream``: deltas that add up, characters that are never torn, and an abort when the iterator is closed."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator

import pytest

from polyaccel import LLM, AdapterNotFound, Completion, Delta, RequestRejected, RequestTooLong, SamplingParams
from polyaccel.engine.stream import DeltaStream
from tests.support.tiny_model import END_ID, TinyModel, random_prompts, scripted

PROMPT = random_prompts(1)[0]
LONG = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)
TEXTS = (
    "naïve 日本語 text 🏴‍☠️ and 👩‍👩‍👧 the end",
    "한국어",
    "\N{GRINNING FACE}",
    "tab\tnew\nline",
    "e\u0301 combining",
)


@pytest.fixture(scope="module")
def llm(tiny: TinyModel) -> Iterator[LLM]:
    with tiny.open(adapters={"plain": tiny.adapter("plain").folder}) as engine:
        yield engine


def wait_until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()


def is_idle(llm: LLM) -> bool:
    health = llm.health()
    return (health.running, health.waiting) == (0, 0) and health.free_kv_blocks == health.kv_blocks


def last(deltas: list[Delta]) -> Completion:
    completion = deltas[-1].completion
    assert completion is not None
    return completion


def test_deltas_add_up_to_the_completion_that_the_last_one_carries(llm: LLM, tiny: TinyModel) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, logprobs=2)
    deltas = list(llm.stream(PROMPT, params, adapter="plain"))
    completion = last(deltas)
    assert list(completion.token_ids) == tiny.greedy(PROMPT, 20, "plain")
    assert "".join(delta.text for delta in deltas) == completion.text
    assert tuple(token for delta in deltas for token in delta.token_ids) == completion.token_ids
    assert completion.logprobs == tuple(entry for delta in deltas for entry in delta.logprobs or ())
    assert [delta.finish_reason for delta in deltas] == [None] * 20 + ["length"]
    [whole] = llm.generate(PROMPT, params, adapter="plain")
    assert (whole.text, whole.token_ids, whole.logprobs) == (completion.text, completion.token_ids, completion.logprobs)


@pytest.mark.parametrize("text", TEXTS)
def test_characters_split_over_tokens_come_out_whole(tiny: TinyModel, text: str) -> None:
    ids = tiny.tokenizer(text)["input_ids"]
    with tiny.open(backend=scripted({1: ids}, 2)) as engine:
        deltas = list(engine.stream([1, 2], SamplingParams(temperature=0.0, seed=1, max_tokens=200)))
    pieces = [delta.text for delta in deltas]
    assert "".join(pieces) == last(deltas).text == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert len([piece for piece in pieces if piece]) > 1 or len(text) == 1


def test_an_unfinished_character_at_the_end_becomes_a_replacement(tiny: TinyModel) -> None:
    ids = tiny.tokenizer("ok 🙂")["input_ids"][:-1]
    with tiny.open(backend=scripted({1: ids}, 2)) as engine:
        deltas = list(engine.stream([1, 2], SamplingParams(temperature=0.0, seed=1, max_tokens=200)))
    assert "".join(delta.text for delta in deltas) == last(deltas).text == "ok \N{REPLACEMENT CHARACTER}"
    assert last(deltas).token_ids == (*ids, END_ID)


def test_text_that_may_begin_a_stop_string_is_held_back(tiny: TinyModel) -> None:
    ids = tiny.tokenizer("abcabd.")["input_ids"]
    with tiny.open(backend=scripted({1: ids}, 2)) as engine:
        params = SamplingParams(temperature=0.0, seed=1, max_tokens=50, stop="abd")
        deltas = list(engine.stream([1, 2], params))
    assert [delta.text for delta in deltas if delta.token_ids] == ["", "", "abc", "", "", ""]
    assert last(deltas).text == "abc"
    assert last(deltas).stop_reason == "abd"


def test_the_choices_of_a_stream_each_add_up(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, seed=4, max_tokens=12, ignore_eos=True, n=3)
    deltas = list(llm.stream(PROMPT, params))
    whole = llm.generate(PROMPT, params)
    for choice in range(3):
        own = [delta for delta in deltas if delta.index == choice]
        assert "".join(delta.text for delta in own) == last(own).text == whole[choice].text
        assert last(own).token_ids == whole[choice].token_ids
        assert last(own).index == choice
    assert len({completion.token_ids for completion in whole}) == 3


def test_closing_the_iterator_aborts_the_request_and_frees_its_blocks(llm: LLM) -> None:
    stream = llm.stream(PROMPT, LONG)
    assert next(stream).token_ids
    stream.close()
    assert wait_until(lambda: is_idle(llm))
    assert list(stream) == []
    stream.close()


def test_a_stream_that_was_never_read_is_aborted_when_closed_or_dropped(tiny: TinyModel) -> None:
    # The fake device is slow: left alone the answers would take minutes.
    with tiny.open(backend=scripted({0: [40] * 400}, len(PROMPT), latency=0.5)) as engine:
        params = SamplingParams(temperature=0.0, seed=0, max_tokens=400)
        engine.stream(PROMPT, params).close()
        dropped: DeltaStream | None = engine.stream(PROMPT, params)
        assert dropped is not None
        dropped = None
        gc.collect()
        assert wait_until(lambda: is_idle(engine))


def test_leaving_a_stream_as_a_context_manager_aborts_it(llm: LLM) -> None:
    with llm.stream(PROMPT, LONG) as stream:
        next(stream)
    assert wait_until(lambda: is_idle(llm))


def test_a_loop_left_early_aborts_and_others_go_on(llm: LLM, tiny: TinyModel) -> None:
    other = llm.stream(PROMPT, SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True))
    for count, _ in enumerate(llm.stream(PROMPT, LONG)):
        if count == 3:
            break
    assert list(last(list(other)).token_ids) == tiny.greedy(PROMPT, 30)
    gc.collect()
    assert wait_until(lambda: is_idle(llm))


def test_a_request_is_checked_and_queued_before_the_first_delta_is_asked_for(llm: LLM) -> None:
    with pytest.raises(RequestRejected, match="empty"):
        llm.stream([])
    with pytest.raises(AdapterNotFound, match="'nobody'"):
        llm.stream(PROMPT, adapter="nobody")
    with pytest.raises(RequestTooLong, match="max_tokens=600"):
        llm.stream(PROMPT, SamplingParams(max_tokens=600))
    stream = llm.stream(PROMPT, SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True))
    assert wait_until(lambda: is_idle(llm)), "it runs without being read"
    assert len(list(stream)) == 4


def test_a_call_that_is_interrupted_aborts_all_of_its_requests(llm: LLM, tiny: TinyModel) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    params = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in (2, 400, 400)]
    with pytest.raises(KeyboardInterrupt):
        llm.generate([PROMPT] * 3, params, progress=interrupt)
    assert wait_until(lambda: is_idle(llm))
    [completion] = llm.generate(PROMPT, params[0])
    assert list(completion.token_ids) == tiny.greedy(PROMPT, 2)


def test_closing_the_engine_ends_open_streams(tiny: TinyModel) -> None:
    engine = tiny.open(backend=scripted({0: [40] * 400}, len(PROMPT), latency=0.05))
    stream = engine.stream(PROMPT, SamplingParams(temperature=0.0, seed=0, max_tokens=400))
    next(stream)
    engine.close()
    deltas = list(stream)
    assert last(deltas).finish_reason == "abort"
    stream.close()
    never_read = [delta.text for delta in deltas]
    assert "".join(never_read) in last(deltas).text
