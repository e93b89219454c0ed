"""The engine's thread when something in it fails: every request gets its end and every call its answer."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from polyaccel import LLM, EngineDead, PolyaccelError, SamplingParams
from polyaccel.backend import TableBackend
from tests.support.tiny_model import TinyModel, random_prompts, scripted

PROMPTS = random_prompts(3, seed=31)
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
LONG = SamplingParams(temperature=0.0, seed=0, max_tokens=400, ignore_eos=True)


class Background:
    """A call on a thread of its own, and what it raised."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.error: BaseException | None = None
        self._call = call
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._call()
        except BaseException as error:
            self.error = error

    def result(self) -> BaseException | None:
        self._thread.join(20)
        assert not self._thread.is_alive(), "the call hangs"
        return self.error


def failing_silu(x: Any) -> Any:
    raise ValueError("a planted fault")


def wait_until_running(llm: LLM, count: int) -> None:
    deadline = time.monotonic() + 20
    while llm.health().running < count and time.monotonic() < deadline:
        time.sleep(0.002)


def assert_dead(llm: LLM, message: str) -> None:
    health = llm.health()
    assert health.status == "dead"
    assert message in health.reason
    for call in (
        lambda: llm.generate(PROMPTS[0]),
        lambda: llm.stream(PROMPTS[0]),
        lambda: llm.chat([{"role": "user", "content": "x"}]),
    ):
        with pytest.raises(EngineDead, match=message):
            call()
    llm.close()
    llm.close()


def test_an_operator_that_fails_ends_the_engine_with_its_error_as_the_cause(tiny: TinyModel) -> None:
    llm = tiny.open(backend=TableBackend("cpu", {"silu_and_mul": failing_silu}))
    with pytest.raises(EngineDead, match="a planted fault") as caught:
        llm.generate(PROMPTS, GREEDY)
    causes = []
    error: BaseException | None = caught.value
    while error is not None:
        causes.append(error)
        error = error.__cause__
    assert isinstance(causes[-1], ValueError)
    assert [info.name for info in llm.adapters.list()] == []
    assert_dead(llm, "a planted fault")


def test_a_fault_in_the_engine_s_own_thread_leaves_nobody_waiting(
    tiny: TinyModel, caplog: pytest.LogCaptureFixture
) -> None:
    llm = tiny.open(backend=scripted({0: [40] * 400}, len(PROMPTS[0]), latency=0.02))
    calls = [Background(lambda: llm.generate(PROMPTS[0], LONG)), Background(lambda: list(llm.stream(PROMPTS[0], LONG)))]
    wait_until_running(llm, 2)

    def fail() -> None:
        raise ZeroDivisionError("a bug")

    with caplog.at_level(logging.ERROR, logger="polyaccel.engine"):
        llm.engine.loop._post(fail)
        for call in calls:
            error = call.result()
            assert isinstance(error, EngineDead)
            assert isinstance(error.__cause__, ZeroDivisionError)
    assert "thread failed" in caplog.text
    assert_dead(llm, "ZeroDivisionError: a bug")


def test_a_receiver_that_fails_harms_only_itself(tiny: TinyModel, caplog: pytest.LogCaptureFixture) -> None:
    with tiny.open() as llm:
        engine = llm.engine

        def sink(event: object) -> None:
            raise OSError("nobody is there")

        request = engine.new_request(PROMPTS[0], GREEDY, None, streams=True, sink=sink)
        with caplog.at_level(logging.ERROR, logger="polyaccel.engine"):
            engine.loop.submit([request])
            [completion] = llm.generate(PROMPTS[1], GREEDY)
        assert list(completion.token_ids) == tiny.greedy(PROMPTS[1], 8)
        assert "could not be handed over" in caplog.text
        assert llm.health().status == "ok"


def test_calls_that_wait_when_the_engine_is_closed_are_answered(tiny: TinyModel) -> None:
    llm = tiny.open(
        backend=scripted({0: [40] * 400}, len(PROMPTS[0]), latency=0.02),
        adapters={"plain": tiny.adapter("plain").folder},
    )
    stream = llm.stream(PROMPTS[0], LONG)
    next(stream)
    merging = Background(lambda: llm.adapters.merge("plain"))
    while not llm.engine.loop._paused:
        time.sleep(0.001)
    held = Background(lambda: llm.generate(PROMPTS[1], GREEDY))
    unloading = Background(lambda: llm.adapters.unload("plain"))
    time.sleep(0.05)
    llm.close()
    assert isinstance(held.result(), EngineDead)
    for call in (merging, unloading):
        assert call.result() is None or isinstance(call.error, PolyaccelError)
    assert isinstance(merging.error, EngineDead)


def test_requests_held_back_by_a_change_of_the_weights_run_after_it_failed(tiny: TinyModel) -> None:
    with tiny.open() as llm:
        stream = llm.stream(PROMPTS[0], LONG)
        next(stream)

        def fail() -> None:
            raise OverflowError("not this time")

        changing = Background(lambda: llm.engine.loop.call_when_drained(fail))
        while not llm.engine.loop._paused:
            time.sleep(0.001)
        held = Background(lambda: llm.generate(PROMPTS[1], GREEDY))
        time.sleep(0.02)
        assert llm.health().waiting == 0
        stream.close()
        assert isinstance(changing.result(), OverflowError)
        assert held.result() is None
        [completion] = llm.generate(PROMPTS[1], GREEDY)
        assert list(completion.token_ids) == tiny.greedy(PROMPTS[1], 8)
