"""Requests through the core: endings, events, errors."""

from __future__ import annotations

import numpy as np
import pytest

from polyaccel.backend.errors import ConfigurationError, EngineDead, RequestRejected, RequestTooLong
from polyaccel.engine.core import EngineCore
from polyaccel.engine.sampling_params import SamplingParams
from tests.engine.fake_executor import FakeExecutor, dead
from tests.engine.harness import EOS, VOCABULARY, Engine, capacity, prompt_of

both = pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlap"])


@both
def test_requests_answer_what_they_answer_alone(overlap: bool) -> None:
    engine = Engine(overlap=overlap)
    for index in range(20):
        engine.add(f"r{index}", prompt_of(1 + index, index), seed=index, temperature=index % 2, max_tokens=20)
    engine.run()
    engine.check_answers()
    engine.check_nothing_is_held()


@both
def test_a_request_ends_at_max_tokens_or_at_an_end_of_sequence_id(overlap: bool) -> None:
    engine = Engine(overlap=overlap)
    for seed in range(40):
        engine.add(f"r{seed}", prompt_of(6, seed), max_tokens=12)
    engine.run()
    engine.check_answers()
    reasons = {event.reason for event in engine.finished.values()}
    assert reasons == {"stop", "length"}
    for event in engine.finished.values():
        ends = event.token_ids[-1] in EOS
        assert event.reason == ("stop" if ends else "length")
        assert event.stop_reason is None


def test_a_stop_id_is_named_as_the_reason_and_ignore_eos_goes_on() -> None:
    engine = Engine()
    engine.add("free", prompt_of(6), max_tokens=30, ignore_eos=True)
    engine.run()
    stop = engine.output("free")[7]
    engine.add("stopped", prompt_of(6), max_tokens=30, ignore_eos=True, stop_token_ids=[stop])
    engine.run()
    assert engine.finished["stopped", 0].stop_reason == stop
    assert engine.output("stopped") == engine.output("free")[: engine.output("free").index(stop) + 1]
    assert engine.finished["free", 0].reason == "length"


@both
def test_min_tokens_holds_every_ending_id_back(overlap: bool) -> None:
    engine = Engine(overlap=overlap)
    for seed in range(30):
        engine.add(f"r{seed}", prompt_of(5, seed), max_tokens=30, min_tokens=15)
    engine.run()
    engine.check_answers()
    assert all(len(event.token_ids) > 15 for event in engine.finished.values())
    assert any(event.reason == "stop" for event in engine.finished.values())


def test_an_ending_id_before_min_tokens_does_not_end_the_output_even_if_the_device_samples_one() -> None:
    engine = Engine()
    engine.executor.honours_min_tokens = False
    engine.add("free", prompt_of(6), max_tokens=30, ignore_eos=True)
    engine.run()
    free = engine.output("free")
    first = free.index(free[4])
    for minimum, length in ((first, first + 1), (first + 1, 30)):
        name = f"minimum {minimum}"
        engine.add(name, prompt_of(6), max_tokens=30, ignore_eos=True, stop_token_ids=[free[4]], min_tokens=minimum)
        engine.run()
        again = [place for place, token in enumerate(free) if token == free[4] and place >= minimum]
        assert len(engine.output(name)) == (again[0] + 1 if again else length)


def test_without_max_tokens_a_request_goes_on_to_the_end_of_the_context() -> None:
    engine = Engine(room=capacity(max_model_len=40))
    engine.add("r", prompt_of(7), ignore_eos=True)
    engine.run()
    assert engine.finished["r", 0].reason == "length"
    assert len(engine.output("r")) == 33


@both
def test_the_choices_of_a_request_share_their_prompt(overlap: bool) -> None:
    engine = Engine(overlap=overlap)
    engine.add("r", prompt_of(22), n=4, seed=3, temperature=1.0, max_tokens=10)
    engine.run()
    engine.check_answers()
    assert [engine.finished["r", choice].cached_tokens for choice in range(4)] == [0, 20, 20, 20]
    assert len({tuple(engine.output("r", choice)) for choice in range(4)}) == 4
    engine.check_nothing_is_held()


@both
def test_watched_requests_give_every_token_and_others_none(overlap: bool) -> None:
    engine = Engine(overlap=overlap)
    engine.add("seen", prompt_of(5, 1), watched=True, max_tokens=9)
    engine.add("unseen", prompt_of(5, 2), max_tokens=9)
    engine.run()
    engine.check_answers()
    assert set(engine.tokens) == {("seen", 0)}
    assert engine.tokens["seen", 0] == engine.output("seen")
    assert sum(len(step.ids) for step in engine.steps) == len(engine.output("seen")) + len(engine.output("unseen"))


def test_logprobs_belong_to_their_tokens() -> None:
    engine = Engine()
    engine.add("with", prompt_of(5, 1), logprobs=2, max_tokens=6, ignore_eos=True)
    engine.add("only", prompt_of(5, 2), logprobs=0, max_tokens=6, ignore_eos=True)
    engine.add("none", prompt_of(5, 3), max_tokens=6, ignore_eos=True)
    engine.run()
    for token, entry in zip(engine.output("with"), engine.finished["with", 0].logprobs or (), strict=True):
        assert (entry.token_id, entry.logprob) == (token, -token)
        assert entry.top == ((token, -token), (token + 1, -token - 1))
    assert [entry.top for entry in engine.finished["only", 0].logprobs or ()] == [()] * 6
    assert engine.finished["none", 0].logprobs is None
    assert engine.tokens == {}


@both
def test_a_stop_string_found_outside_ends_one_choice(overlap: bool) -> None:
    engine = Engine(overlap=overlap)
    engine.add("r", prompt_of(9), n=2, watched=True, max_tokens=20, ignore_eos=True, seed=1, temperature=1.0)
    while len(engine.tokens.get(("r", 1), ())) < 3:
        engine.step()
    event = engine.core.finish("r", 1, "###")
    assert event is not None
    engine.note([event])
    assert (event.reason, event.stop_reason) == ("stop", "###")
    assert event.token_ids.tolist() == engine.tokens["r", 1]
    assert engine.core.finish("r", 1, "###") is None
    engine.run()
    assert len(engine.output("r", 0)) == 20
    engine.check_nothing_is_held()


@both
@pytest.mark.parametrize("steps", range(6))
def test_an_abort_at_any_time_frees_everything_and_a_second_one_does_nothing(overlap: bool, steps: int) -> None:
    engine = Engine(overlap=overlap, budget=4)
    engine.add("r", prompt_of(9, 1), n=2, max_tokens=20, seed=1)
    engine.add("other", prompt_of(9, 2), max_tokens=20)
    for _ in range(steps):
        engine.step()
    engine.abort("r")
    assert engine.core.abort("r") == []
    assert engine.core.finish("r", 0, None) is None
    engine.run()
    assert {engine.finished["r", choice].reason for choice in range(2)} == {"abort"}
    engine.check_answers()
    engine.check_nothing_is_held()
    assert engine.core.abort("other") == []


def test_an_abort_storm_on_ten_thousand_requests_leaves_nothing_behind() -> None:
    engine = Engine(room=capacity(kv_blocks=12, request_slots=3), budget=16)
    for index in range(10_000):
        engine.add(f"r{index}", [index % VOCABULARY, 3, 4], max_tokens=4)
        if index % 100 == 0:
            engine.step()
    for index in range(10_000):
        if index % 97:
            engine.abort(f"r{index}")
        if index % 500 == 0:
            engine.step()
    engine.run()
    assert len(engine.finished) == 10_000
    engine.check_answers()
    engine.check_nothing_is_held()


def test_timing_follows_the_clock() -> None:
    engine = Engine()
    engine.add("r", prompt_of(9), max_tokens=8, ignore_eos=True)
    engine.run()
    timing = engine.finished["r", 0].timing
    assert timing.first_token == timing.queue + timing.prefill
    assert min(timing.queue, timing.prefill, timing.decode) >= 1.0
    engine.add("never", prompt_of(9))
    event = engine.core.abort("never")[0]
    assert (event.timing.prefill, event.timing.decode) == (0.0, 0.0)


def test_stats_count_what_the_prefix_cache_saved() -> None:
    engine = Engine()
    engine.add("first", prompt_of(17), max_tokens=4)
    engine.run()
    engine.add("again", prompt_of(17), max_tokens=4)
    engine.run()
    stats = engine.core.stats()
    assert (stats.prefix_queries, stats.prefix_hits) == (34, 16)
    assert engine.finished["again", 0].cached_tokens == 16


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "empty"),
        ([[1, 2]], "flat"),
        ([[1], [2, 3]], "flat"),
        ([1.0], "float64"),
        ([True], "bool"),
        ([10**30], "object"),
        ([1, VOCABULARY], f"id {VOCABULARY}"),
        ([-1], "id -1"),
    ],
)
def test_a_prompt_that_is_not_token_ids_is_refused(prompt: list[int], message: str) -> None:
    engine = Engine()
    with pytest.raises(RequestRejected, match=message):
        engine.add("r", prompt)
    assert not engine.core.has_work


@pytest.mark.parametrize("priority", [1.5, True, 2**31, None])
def test_a_priority_that_is_no_small_integer_is_refused(priority: int) -> None:
    with pytest.raises(RequestRejected, match="priority="):
        Engine().add("r", [1], priority=priority)


@pytest.mark.parametrize("field", ["logit_bias", "stop_token_ids", "allowed_token_ids"])
def test_an_id_outside_the_vocabulary_is_refused_by_field(field: str) -> None:
    value = {VOCABULARY: 1.0} if field == "logit_bias" else [VOCABULARY]
    with pytest.raises(RequestRejected, match=field):
        Engine().add("r", [1], **{field: value})


def test_what_can_never_fit_is_refused_with_both_numbers() -> None:
    engine = Engine(room=capacity(kv_blocks=5, max_model_len=100))
    with pytest.raises(RequestTooLong, match="20"):
        engine.add("r", prompt_of(20))
    with pytest.raises(RequestTooLong, match=r"max_tokens=11 make 21"):
        engine.add("r", prompt_of(10), max_tokens=11)
    engine.add("fits", prompt_of(10), max_tokens=10, ignore_eos=True)
    engine.run()
    engine.check_answers()


def test_a_request_id_in_use_is_refused_and_can_be_used_again_later() -> None:
    engine = Engine()
    engine.add("r", [1, 2], max_tokens=2)
    with pytest.raises(RequestRejected, match="'r' is in use"):
        engine.add("r", [1, 2])
    engine.run()
    engine.core.add_request("r", [1, 2], SamplingParams())


def test_a_budget_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="max_batched_tokens=0"):
        EngineCore(FakeExecutor(capacity()), max_batched_tokens=0)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="kv_blocks=0"):
        EngineCore(FakeExecutor(capacity(kv_blocks=0)))  # type: ignore[arg-type]


# -- failures ----------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("where", ["fail_submit", "fail_collect"])
@pytest.mark.parametrize("steps", [0, 3])
def test_a_dead_executor_ends_every_request_with_its_error(overlap: bool, where: str, steps: int) -> None:
    engine = Engine(overlap=overlap, room=capacity(request_slots=2))
    for index in range(4):
        engine.add(f"r{index}", prompt_of(5, index), n=2, ignore_eos=True, seed=1)
    for _ in range(steps):
        engine.step()
    error = dead()
    setattr(engine.executor, where, error)
    engine.run()
    assert len(engine.finished) == 8
    assert {(event.reason, event.error) for event in engine.finished.values()} == {("error", error)}
    engine.check_answers()
    with pytest.raises(EngineDead, match="rank 1"):
        engine.add("late", [1])
    assert engine.core.step().idle
    assert engine.adapters.acquired == 0


def test_any_other_failure_of_the_executor_is_the_cause() -> None:
    engine = Engine()
    engine.add("r", [1, 2])
    cause = RuntimeError("unplugged")
    engine.executor.fail_submit = cause
    engine.run()
    assert engine.core.error is not None
    assert engine.core.error.__cause__ is cause
    assert "unplugged" in str(engine.finished["r", 0].error)


def test_an_adapter_that_fails_ends_only_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine()
    acquire = engine.adapters.acquire

    def failing(mix: tuple[tuple[str, float], ...]) -> object:
        if mix[0][0] == "broken":
            raise OSError("the file is gone")
        return acquire(mix)

    monkeypatch.setattr(engine.adapters, "acquire", failing)
    engine.add("good", prompt_of(5, 1), (("fine", 1.0),), max_tokens=5)
    engine.add("bad", prompt_of(5, 2), (("broken", 1.0),), n=2, max_tokens=5, seed=1)
    engine.add("base", prompt_of(5, 3), max_tokens=5)
    engine.run()
    engine.check_answers()
    assert {key: event.reason for key, event in engine.finished.items() if event.reason == "error"} == {
        ("bad", 0): "error",
        ("bad", 1): "error",
    }
    assert "gone" in str(engine.finished["bad", 0].error)
    engine.check_nothing_is_held()


def test_an_executor_that_mixes_up_its_answers_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine()
    engine.add("r", [1, 2])
    collect = engine.executor.collect

    def shuffled() -> object:
        result = collect()
        return type(result)(step_id=result.step_id, ids=np.zeros(3, dtype=np.int64))

    monkeypatch.setattr(engine.executor, "collect", shuffled)
    engine.run()
    assert "lost its order" in str(engine.finished["r", 0].error)
