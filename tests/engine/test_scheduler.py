"""Who is served when, and what happens when something is short."""

from __future__ import annotations

import numpy as np
import pytest

from polyaccel.backend.step import TokenClass
from tests.engine.harness import Engine, capacity, prompt_of

both = pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlap"])


def tokens_by_step(engine: Engine) -> list[int]:
    return [message.inputs.tokens for message in engine.executor.messages]


def test_a_long_prompt_is_cut_into_chunks_of_the_budget() -> None:
    engine = Engine(budget=10)
    engine.add("r", prompt_of(33), max_tokens=2, ignore_eos=True)
    engine.run()
    assert tokens_by_step(engine) == [10, 10, 10, 3, 1]
    engine.check_answers()


@both
def test_decode_goes_on_while_a_long_prompt_is_computed(overlap: bool) -> None:
    engine = Engine(budget=10, overlap=overlap)
    engine.add("short", prompt_of(3), max_tokens=30, ignore_eos=True)
    engine.step()
    engine.step()
    engine.add("long", prompt_of(40, 1), max_tokens=3)
    for _ in range(4):
        engine.step()
        inputs = engine.executor.messages[-1].inputs
        assert inputs.sequences == 2
        assert sorted(np.diff(inputs.query_starts).tolist()) == [1, 9]
        assert inputs.token_class is TokenClass.MIXED
    engine.run()
    engine.check_answers()


def test_every_step_stays_within_the_budget() -> None:
    engine = Engine(budget=7, room=capacity(request_slots=8))
    for index in range(12):
        engine.add(f"r{index}", prompt_of(3 + 2 * index, index), max_tokens=10, ignore_eos=True)
    engine.run()
    assert max(tokens_by_step(engine)) == 7
    engine.check_answers()


def test_a_lower_priority_number_is_served_first() -> None:
    engine = Engine(room=capacity(request_slots=1))
    for name, priority in (("first", 1), ("second", 1), ("urgent", 0), ("idle", 2)):
        engine.add(name, prompt_of(4), priority=priority, max_tokens=2)
    engine.run()
    assert [name for name, _ in engine.finished] == ["urgent", "first", "second", "idle"]


@both
def test_the_youngest_is_preempted_and_answers_the_same(overlap: bool) -> None:
    engine = Engine(room=capacity(kv_blocks=10, max_model_len=40), overlap=overlap, prefix_caching=False)
    for index in range(3):
        engine.add(f"r{index}", prompt_of(8, index), max_tokens=24, ignore_eos=True, temperature=1.0, seed=index)
    engine.run()
    assert engine.core.stats().preemptions > 0
    engine.check_answers()
    engine.check_nothing_is_held()
    assert next(iter(engine.finished)) == ("r0", 0), "the oldest is never preempted"


@both
def test_a_preempted_sequence_returns_with_its_output(overlap: bool) -> None:
    engine = Engine(room=capacity(kv_blocks=8, max_model_len=32), overlap=overlap)
    for index in range(2):
        engine.add(
            f"r{index}", prompt_of(8, index), max_tokens=22, ignore_eos=True, presence_penalty=1.0, seed=70 + index
        )
    engine.run()
    rows = [row for message in engine.executor.messages for _, row in message.begin]
    returned = [row for row in rows if row.output_ids is not None]
    assert returned
    assert {row.seed for row in returned} == {71}
    for row in returned:
        output = row.output_ids.tolist()
        assert output == engine.output("r1")[: len(output)]
        assert row.prompt_ids.tolist() == prompt_of(8, 1)
    engine.check_answers()


def test_a_single_sequence_may_use_every_block() -> None:
    engine = Engine(room=capacity(kv_blocks=6, max_model_len=24))
    engine.add("r", prompt_of(3), ignore_eos=True)
    engine.add("next", prompt_of(20, 1), ignore_eos=True)
    engine.run()
    assert len(engine.output("r")) == 21
    engine.check_answers()


@both
def test_ten_thousand_requests_pass_through_a_small_cache(overlap: bool) -> None:
    engine = Engine(room=capacity(kv_blocks=16, request_slots=8, max_model_len=16), overlap=overlap)
    for index in range(10_000):
        engine.add(f"r{index}", [index % 90, 1 + index % 7, 2], max_tokens=2)
    engine.run(limit=10_000)
    assert len(engine.finished) == 10_000
    assert all(engine.finished[f"r{index}", 0].reason in ("stop", "length") for index in range(10_000))
    engine.check_nothing_is_held()


def test_admission_leaves_a_reserve_to_those_who_run() -> None:
    engine = Engine(room=capacity(kv_blocks=128, max_model_len=512), budget=512)
    engine.add("first", prompt_of(4), max_tokens=100, ignore_eos=True)
    engine.add("fits", prompt_of(4 * 124, 1), max_tokens=1)
    engine.step()
    assert engine.core.stats().running == 2
    engine = Engine(room=capacity(kv_blocks=128, max_model_len=512), budget=512)
    engine.add("first", prompt_of(4), max_tokens=100, ignore_eos=True)
    engine.add("does not", prompt_of(4 * 126, 1), max_tokens=1)
    engine.step()
    assert engine.core.stats().running == 1
    engine.run()
    engine.check_answers()


def test_a_blocked_head_is_looked_up_once_however_many_steps_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(room=capacity(kv_blocks=16, max_model_len=64), overlap=False)
    lookups = []
    lookup = engine.core._cache.lookup
    monkeypatch.setattr(engine.core._cache, "lookup", lambda *args: lookups.append(args) or lookup(*args))
    engine.add("first", prompt_of(12), max_tokens=50, ignore_eos=True)
    engine.add("big", prompt_of(60, 1), max_tokens=1)
    for _ in range(40):
        engine.step()
    assert len(lookups) == 2
    engine.run()
    engine.check_answers()


# -- slots and blocks under overlap ------------------------------------------------------------------------------------


def test_overlap_submits_a_step_before_it_collects_the_one_before() -> None:
    engine = Engine(overlap=True)
    engine.add("r", prompt_of(4), max_tokens=5, ignore_eos=True)
    first = engine.step()
    assert (first.submitted, first.collected) == (True, False)
    for _ in range(4):
        events = engine.step()
        assert (events.submitted, events.collected) == (True, True)
        assert engine.executor.messages[-1].inputs.token_ids.tolist() == [-1]
    last = engine.step()
    assert (last.submitted, last.collected) == (False, True)
    assert not engine.core.has_work


def test_without_overlap_every_token_is_known_when_it_is_submitted() -> None:
    engine = Engine(overlap=False)
    for index in range(5):
        engine.add(f"r{index}", prompt_of(4, index), max_tokens=5)
    engine.run()
    assert all((message.inputs.token_ids >= 0).all() for message in engine.executor.messages)


def test_a_length_that_is_known_ahead_costs_no_extra_step() -> None:
    steps = {}
    for overlap in (False, True):
        engine = Engine(overlap=overlap)
        engine.add("r", prompt_of(4), max_tokens=9, ignore_eos=True)
        steps[overlap] = len(engine.run().executor.messages)
    assert steps == {False: 9, True: 9}


def test_a_slot_and_its_blocks_wait_for_the_step_that_still_names_them() -> None:
    engine = Engine(overlap=True, room=capacity(request_slots=2, kv_blocks=16))
    engine.add("r", prompt_of(4), max_tokens=40, ignore_eos=True)
    engine.step()
    engine.step()
    engine.abort("r")
    assert engine.core.stats().kv_blocks_used == 2
    assert engine.core.has_work
    engine.step()
    assert engine.core.stats().kv_blocks_used == 0
    assert not engine.core.has_work


# -- prefix cache ------------------------------------------------------------------------------------------------------


@both
def test_a_prompt_is_shared_only_once_its_step_has_completed(overlap: bool) -> None:
    engine = Engine(overlap=overlap)
    engine.add("a", prompt_of(16), max_tokens=4)
    engine.add("b", prompt_of(16), max_tokens=4)
    engine.run()
    engine.add("c", prompt_of(16), max_tokens=4)
    engine.run()
    assert [engine.finished[name, 0].cached_tokens for name in "abc"] == [0, 0, 12]
    engine.check_answers()


def test_the_prompt_of_an_aborted_request_is_shared() -> None:
    engine = Engine()
    engine.add("r", prompt_of(16), max_tokens=4)
    engine.step()
    engine.abort("r")
    engine.run()
    engine.add("again", prompt_of(16), max_tokens=4)
    engine.run()
    assert engine.finished["again", 0].cached_tokens == 12
    engine.check_answers()


def test_output_is_shared_with_a_prompt_that_continues_it() -> None:
    engine = Engine()
    engine.add("r", prompt_of(6), max_tokens=11, ignore_eos=True)
    engine.run()
    turn = prompt_of(6) + engine.output("r")
    engine.add("next", [*turn, 1, 2], max_tokens=3)
    engine.run()
    assert engine.finished["next", 0].cached_tokens == 16
    engine.check_answers()


def test_adapters_and_their_weights_do_not_share_keys_and_values() -> None:
    engine = Engine()
    mixes = [(), (("a", 1.0),), (("a", 0.5),), (("b", 1.0),), (("a", 1.0), ("b", 1.0))]
    for turn in range(2):
        for index, mix in enumerate(mixes):
            engine.add(f"{turn}-{index}", prompt_of(13), mix, max_tokens=5)
            engine.run()
            assert engine.finished[f"{turn}-{index}", 0].cached_tokens == 12 * turn
    engine.check_answers()


# -- adapters ----------------------------------------------------------------------------------------------------------


@both
def test_rows_of_adapters_and_mixes_reach_the_right_tokens(overlap: bool) -> None:
    engine = Engine(overlap=overlap, budget=11)
    mixes = [(), (("b", 1.0),), (("a", 0.5), ("c", 2.0)), (("a", 1.0),), (("c", 1.0),), ()]
    for index in range(12):
        engine.add(f"r{index}", prompt_of(3 + index, index), mixes[index % 6], max_tokens=9)
    engine.run()
    engine.check_answers()
    engine.check_nothing_is_held()


def test_the_adapter_rows_of_an_unchanged_batch_are_one_object() -> None:
    engine = Engine()
    for index in range(4):
        engine.add(f"r{index}", prompt_of(4, index), (("a", 1.0),), max_tokens=12, ignore_eos=True)
    engine.run()
    rows = [m.inputs.rows("tokens") for m in engine.executor.messages if m.inputs.token_class is TokenClass.DECODE]
    assert len(rows) > 5
    assert len({id(entry) for entry in rows}) == 1


def test_an_adapter_that_is_not_resident_holds_nobody_else_up() -> None:
    engine = Engine(adapter_delay=30)
    engine.add("slow", prompt_of(4), (("a", 1.0),), max_tokens=3)
    engine.add("base", prompt_of(4, 1), max_tokens=3)
    engine.run()
    assert [name for name, _ in engine.finished] == ["base", "slow"]
    engine.check_answers()


def test_waiting_for_an_adapter_alone_is_idle() -> None:
    engine = Engine(adapter_delay=3)
    engine.add("r", prompt_of(4), (("a", 1.0),), max_tokens=2, ignore_eos=True)
    assert engine.step().idle
    engine.run()
    engine.check_answers()
    assert engine.core.step().idle


def test_more_adapters_than_slots_take_turns() -> None:
    engine = Engine(room=capacity(adapter_slots=2))
    for index in range(60):
        engine.add(f"r{index}", prompt_of(4, index), ((f"adapter-{index % 20}", 1.0),), max_tokens=3)
    engine.run()
    engine.check_answers()
    engine.check_nothing_is_held()


def test_a_stream_of_requests_for_resident_adapters_does_not_starve_another() -> None:
    engine = Engine(room=capacity(adapter_slots=1, request_slots=4))
    count = 0
    for _ in range(8):
        engine.add(f"a{count}", prompt_of(4, count), (("a", 1.0),), max_tokens=4)
        count += 1
    engine.add("b", prompt_of(4), (("b", 1.0),), max_tokens=4)
    for _ in range(400):
        engine.step()
        while engine.core.stats().waiting < 4:
            engine.add(f"a{count}", prompt_of(4, count), (("a", 1.0),), max_tokens=4)
            count += 1
        if ("b", 0) in engine.finished:
            break
    assert ("b", 0) in engine.finished
    for name in list(engine.asked):
        engine.abort(name)
    engine.run()
    engine.check_answers()
    engine.check_nothing_is_held()
