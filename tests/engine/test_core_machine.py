"""Anything may happen in any order: requests, aborts, steps; every token is still the one its request answers alone."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.engine.harness import Engine, capacity

MIXES = st.sampled_from(
    [(), (), (), (("a", 1.0),), (("b", 1.0),), (("a", 0.5),), (("a", 1.0), ("c", 0.25)), (("d", 1.0),), (("e", 2.0),)]
)


class CoreMachine(RuleBasedStateMachine):
    @initialize(
        blocks=st.integers(4, 24),
        block_size=st.sampled_from([1, 2, 3, 4, 8]),
        slots=st.integers(1, 6),
        budget=st.integers(1, 24),
        overlap=st.booleans(),
        lazy=st.booleans(),
        prefix_caching=st.booleans(),
        adapter_slots=st.integers(2, 4),
        adapter_delay=st.integers(0, 3),
    )
    def start(
        self,
        blocks: int,
        block_size: int,
        slots: int,
        budget: int,
        overlap: bool,
        lazy: bool,
        prefix_caching: bool,
        adapter_slots: int,
        adapter_delay: int,
    ) -> None:
        self.engine = Engine(
            room=capacity(
                kv_blocks=blocks,
                kv_block_size=block_size,
                request_slots=slots,
                max_model_len=40,
                adapter_slots=adapter_slots,
            ),
            overlap=overlap,
            lazy=lazy,
            budget=budget,
            prefix_caching=prefix_caching,
            adapter_delay=adapter_delay,
        )
        self.count = 0

    @rule(
        family=st.integers(0, 2),
        length=st.integers(1, 20),
        new=st.integers(1, 16),
        minimum=st.integers(0, 4),
        n=st.sampled_from([1, 1, 1, 2, 3]),
        mix=MIXES,
        temperature=st.sampled_from([0.0, 1.0]),
        priority=st.integers(0, 1),
        watched=st.booleans(),
    )
    def add(
        self,
        family: int,
        length: int,
        new: int,
        minimum: int,
        n: int,
        mix: tuple[tuple[str, float], ...],
        temperature: float,
        priority: int,
        watched: bool,
    ) -> None:
        room = self.engine.core.max_tokens
        if room < 2:
            return
        length = min(length, room - 1)
        new = min(new, room - length)
        # Few families of prompts, so that prefixes are shared.
        prompt = np.random.default_rng(family).integers(0, 50, size=20)[:length].tolist()
        self.engine.add(
            f"r{self.count}",
            prompt,
            mix,
            priority=priority,
            watched=watched,
            max_tokens=new,
            min_tokens=min(minimum, new),
            n=n,
            seed=self.count % 5,
            temperature=temperature,
        )
        self.count += 1

    @precondition(lambda self: self.count > 0)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.engine.abort(f"r{data.draw(st.integers(0, self.count - 1))}")

    @rule(times=st.integers(1, 12))
    def step(self, times: int) -> None:
        for _ in range(times):
            self.engine.step()

    @rule(least=st.integers(2, 24))
    def memory_is_short(self, least: int) -> None:
        self.engine.executor.lacks_room = lambda step: step.tokens >= least

    @rule()
    def memory_is_free(self) -> None:
        self.engine.executor.lacks_room = lambda step: False

    @rule()
    def forget_the_cache(self) -> None:
        self.engine.core.clear_prefix_cache()

    @invariant()
    def blocks_add_up(self) -> None:
        if not hasattr(self, "engine"):
            return
        state, pool = self.engine.core._state, self.engine.core._cache.pool
        held = [block for slot, count in enumerate(state.block_counts) for block in state.block_tables[slot, :count]]
        assert len(set(held)) == pool.used
        assert all(pool.references(block) == held.count(block) for block in set(held))

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            self.engine.run(limit=400 + 200 * self.count)
            self.engine.check_answers()
            self.engine.check_nothing_is_held()


TestCoreMachine = CoreMachine.TestCase
TestCoreMachine.settings = settings(stateful_step_count=40, deadline=None)


@given(
    lengths=st.lists(st.integers(1, 24), min_size=1, max_size=10),
    budget=st.integers(1, 40),
    blocks=st.integers(12, 60),
    slots=st.integers(1, 8),
    overlap=st.booleans(),
    prefix_caching=st.booleans(),
    temperature=st.sampled_from([0.0, 0.8]),
)
@settings(deadline=None)
def test_tokens_depend_on_nothing_but_the_request(
    lengths: list[int],
    budget: int,
    blocks: int,
    slots: int,
    overlap: bool,
    prefix_caching: bool,
    temperature: float,
) -> None:
    engine = Engine(
        room=capacity(kv_blocks=blocks, request_slots=slots, max_model_len=48),
        budget=budget,
        overlap=overlap,
        prefix_caching=prefix_caching,
    )
    for index, length in enumerate(lengths):
        prompt = [7] * (length // 2) + [index] * (length - length // 2)
        engine.add(f"r{index}", prompt, temperature=temperature, seed=index, max_tokens=24, n=1 + index % 2)
    engine.run()
    engine.check_answers()
    engine.check_nothing_is_held()
