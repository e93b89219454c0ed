"""A step's sequences become calls whose rows and lengths FIA takes."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from polyaccel.backend import StepInput, TokenClass
from polyaccel_npu.attention_plan import KeyRoom, plan_attention


def step(queries: list[int], contexts: list[int], padding: int = 0) -> StepInput:
    tokens = sum(queries) + padding
    none = np.zeros(0, dtype=np.int64)
    return StepInput(
        token_class=TokenClass.MIXED,
        token_ids=np.zeros(tokens, dtype=np.int64),
        positions=np.zeros(tokens, dtype=np.int64),
        query_starts=np.cumsum([0, *queries]).astype(np.int32),
        context_lengths=np.array(contexts, dtype=np.int32),
        block_tables=np.zeros((len(queries), 1), dtype=np.int32),
        kv_slots=np.full(tokens, -1, dtype=np.int64),
        request_slots=np.zeros(len(queries), dtype=np.int32),
        logits_rows=none,
        sample_slots=none,
        uniforms=np.zeros(0, dtype=np.float32),
    )


@given(st.data())
def test_every_visible_query_is_in_one_call_and_no_other(data: st.DataObject) -> None:
    queries = data.draw(st.lists(st.integers(0, 4), min_size=0, max_size=6))
    contexts = [data.draw(st.integers(0, 6)) for _ in queries]
    padding = data.draw(st.integers(0, 3))
    inputs = step(queries, contexts, padding)
    plan = plan_attention(inputs)
    seen = np.zeros(inputs.tokens, dtype=int)
    for call in plan.calls:
        seen[call.begin : call.end] += 1
        assert len(call.lengths) == call.last - call.first
        assert min(call.lengths) > 0
        assert call.decodes or call.last == call.first + 1
        if not call.decodes:
            assert call.end - call.begin <= call.lengths[0], "a query that sees no key is refused by nobody and wrong"
    expected = np.zeros(inputs.tokens, dtype=int)
    starts = inputs.query_starts
    for i, context in enumerate(contexts):
        visible = min(int(starts[i + 1] - starts[i]), context)
        expected[int(starts[i + 1]) - visible : int(starts[i + 1])] = 1
    assert np.array_equal(seen, expected)
    assert sum(zeros for zeros, _ in plan.gaps()) == int((expected == 0).sum())


def test_sequences_with_one_query_share_a_call() -> None:
    plan = plan_attention(step([1, 1, 5, 1], [3, 9, 5, 2]))
    assert [(c.first, c.last, c.lengths) for c in plan.calls] == [(0, 2, (3, 9)), (2, 3, (5,)), (3, 4, (2,))]
    assert plan.covered


@given(
    contexts=st.lists(st.integers(0, 40), min_size=1, max_size=8),
    size=st.sampled_from([1, 4, 16]),
    extra=st.integers(0, 9),
)
def test_calls_hold_no_more_blocks_than_the_cache_and_no_fewer_sequences_than_fit(
    contexts: list[int], size: int, extra: int
) -> None:
    room = KeyRoom(size, -(-max(contexts) // size) + extra)
    plan = plan_attention(step([1] * len(contexts), contexts), room)
    assert [i for call in plan.calls for i in range(call.first, call.last)] == [i for i, n in enumerate(contexts) if n]
    for call in plan.calls:
        assert room.takes(call.lengths)
    for one, other in pairwise(plan.calls):
        if one.last == other.first:
            assert not room.takes((*one.lengths, other.lengths[0])), "two calls where one would do"
    if room.takes(contexts) and min(contexts) > 0:
        assert len(plan.calls) == 1
