"""Memory runs out while steps run: they are done again as smaller ones, and one request at most is lost."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyaccel.backend.errors import EngineDead, OutOfMemory
from polyaccel.backend.sampling import SampleOutput
from polyaccel.backend.step import StepInput
from polyaccel.engine import scheduler
from polyaccel.engine.messages import StepResult
from polyaccel.engine.runner import Runner
from polyaccel.engine.sampling_params import SamplingParams
from tests.engine.harness import Engine, prompt_of
from tests.support.tiny_model import TinyModel


@given(
    lengths=st.lists(st.integers(1, 24), min_size=1, max_size=8),
    least=st.integers(2, 12),
    overlap=st.booleans(),
    lazy=st.booleans(),
    n=st.integers(1, 3),
)
def test_steps_that_find_no_room_are_done_again_in_smaller_ones_with_the_same_tokens(
    lengths: list[int], least: int, overlap: bool, lazy: bool, n: int
) -> None:
    engine = Engine(overlap=overlap, lazy=lazy)
    engine.executor.lacks_room = lambda step: step.tokens >= least
    for i, length in enumerate(lengths):
        engine.add(f"r{i}", prompt_of(length, i), max_tokens=9, n=n, seed=i, temperature=1.0)
    engine.run()
    engine.check_answers()
    engine.check_nothing_is_held()
    assert {event.reason for event in engine.finished.values()} <= {"stop", "length"}
    assert (engine.core.stats().no_room > 0) == (engine.executor.skipped > 0)
    assert engine.executor.skipped > 0 or sum(lengths) < 2 * least


@given(victim=st.integers(0, 4), overlap=st.booleans(), lazy=st.booleans(), after=st.integers(0, 6))
def test_a_request_of_which_no_token_fits_ends_with_the_error_and_the_others_answer(
    victim: int, overlap: bool, lazy: bool, after: int
) -> None:
    engine = Engine(overlap=overlap, lazy=lazy)
    for i in range(5):
        engine.add(f"r{i}", prompt_of(20 if i == victim else 6, i), max_tokens=12, ignore_eos=True)

    def lacks_room(step: StepInput) -> bool:
        # Contexts as long as the victim's, from some token on.
        return bool((step.context_lengths > 18 + after).any())

    engine.executor.lacks_room = lacks_room
    engine.run()
    engine.check_answers()
    engine.check_nothing_is_held()
    reasons = {request: event.reason for (request, _), event in engine.finished.items()}
    assert reasons == {f"r{i}": "error" if i == victim else "length" for i in range(5)}
    error = engine.finished[f"r{victim}", 0].error
    assert isinstance(error, OutOfMemory)
    assert "memory_fraction" in str(error)
    assert engine.core.error is None


def test_steps_grow_again_once_many_have_found_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "CALM", 30)
    engine = Engine(budget=32)
    engine.executor.lacks_room = lambda step: step.tokens > 15
    engine.add("long", prompt_of(30), max_tokens=2, ignore_eos=True)
    engine.run()
    assert engine.core._scheduler._budget == 15
    engine.executor.lacks_room = lambda step: False
    engine.add("next", prompt_of(4), max_tokens=20, ignore_eos=True)
    engine.run()
    assert engine.core._scheduler._budget == 15
    engine.add("last", prompt_of(4), max_tokens=50, ignore_eos=True)
    engine.run()
    assert engine.core._scheduler._budget == 32


def test_an_aborted_request_of_a_skipped_step_holds_nothing() -> None:
    engine = Engine(overlap=True, lazy=True)
    engine.executor.lacks_room = lambda step: step.tokens >= 8
    engine.add("a", prompt_of(20), max_tokens=4)
    engine.add("b", prompt_of(5, 1), max_tokens=4)
    engine.step()
    engine.abort("a")
    engine.run()
    engine.check_answers()
    engine.check_nothing_is_held()


def test_a_step_that_was_run_after_one_without_room_ends_the_engine() -> None:
    engine = Engine(overlap=True)
    collect = engine.executor.collect

    def forgetful() -> StepResult:
        result = collect()
        nothing = StepResult(step_id=result.step_id, ids=np.zeros(0, dtype=np.int64), no_room="full")
        return nothing if result.step_id == 1 else result

    engine.executor.collect = forgetful  # type: ignore[method-assign]
    engine.add("a", prompt_of(4), max_tokens=9, ignore_eos=True)
    engine.run()
    assert engine.finished["a", 0].reason == "error"
    assert isinstance(engine.core.error, EngineDead)
    assert "step 2 was run although step 1" in str(engine.core.error)


@pytest.mark.parametrize("overlap", [True, False])
def test_a_model_answers_the_same_where_memory_is_short(
    overlap: bool, tiny: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [list(range(3, 3 + length)) for length in (20, 4, 9, 1, 13)]
    params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    with tiny.open(overlap=overlap) as llm:
        expected = [out.token_ids for out in llm.generate(prompts, params)]
    run = Runner._run
    refused: list[int] = []

    def short(self: Runner, inputs: StepInput) -> SampleOutput:
        if inputs.tokens > 3:
            refused.append(inputs.tokens)
            raise OutOfMemory(f"{inputs.tokens} rows")
        return run(self, inputs)

    monkeypatch.setattr(Runner, "_run", short)
    with tiny.open(overlap=overlap) as llm:
        assert [out.token_ids for out in llm.generate(prompts, params)] == expected
    assert refused == sorted(refused, reverse=True)
    assert refused
