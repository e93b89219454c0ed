from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyaccel.backend.composite.sampling import sample
from polyaccel.backend.composite.sampling_state import TensorSamplingState
from polyaccel.backend.errors import OperatorError
from polyaccel.backend.sampling import SampleOutput, SamplingRow, SamplingSpec, SamplingState
from tests.backend.composite.cases import CPU, Draw, f64, step_input, step_of, without_readback

EPSILON = 2e-5


def new_state(rows: list[SamplingRow], vocabulary: int, *, slots: list[int] | None = None) -> TensorSamplingState:
    state = TensorSamplingState(SamplingSpec(request_slots=16, vocabulary=vocabulary, max_top_logprobs=5), CPU)
    for slot, row in zip(slots or range(len(rows)), rows, strict=True):
        state.write(slot, row)
    return state


def draw_ids(
    logits: torch.Tensor, state: TensorSamplingState, uniforms: list[float], slots: list[int] | None = None
) -> SampleOutput:
    own = slots if slots is not None else list(range(len(uniforms)))
    step = step_of(step_input(sample_slots=own, uniforms=uniforms))
    result = without_readback(sample, logits, state, step)
    assert isinstance(result, SampleOutput)
    return result


# -- the reference ---------------------------------------------------------------------------------------------------


def adjusted(logits: np.ndarray, row: SamplingRow) -> np.ndarray:
    """Logits after penalties, bias and mask, one id at a time; -inf where masked or not a number."""
    prompt = [] if row.prompt_ids is None else row.prompt_ids.tolist()
    output = [] if row.output_ids is None else row.output_ids.tolist()
    bias = (
        {}
        if row.bias_ids is None or row.bias_values is None
        else dict(zip(row.bias_ids.tolist(), row.bias_values, strict=True))
    )
    scores = np.zeros(len(logits))
    for token, value in enumerate(logits.tolist()):
        score = -math.inf if math.isnan(value) else value
        if token in prompt or token in output:
            score = score / row.repetition_penalty if score > 0 else score * row.repetition_penalty
        score -= row.presence_penalty * (token in output) + row.frequency_penalty * output.count(token)
        score += bias.get(token, 0.0)
        masked = row.allowed is not None and not row.allowed[token]
        if row.forbidden_ids is not None and len(output) < row.forbidden_until:
            masked = masked or token in row.forbidden_ids.tolist()
        scores[token] = -math.inf if masked else score
    return scores


def acceptable(scores: np.ndarray, row: SamplingRow, u: float) -> set[int]:
    """Ids that some rounding within EPSILON of the filters and of the CDF may give."""
    if row.temperature == 0.0:
        return {int(np.argmax(scores))}
    order = sorted(range(len(scores)), key=lambda t: (-scores[t], t))
    mass = [math.exp((scores[t] - scores[order[0]]) / row.temperature) for t in range(len(scores))]
    ids: set[int] = set()
    for slack in (1 - EPSILON, 1.0, 1 + EPSILON):
        kept = order[: row.top_k] if row.top_k > 0 else list(order)
        total, before, nucleus = sum(mass[t] for t in kept), 0.0, []
        for t in kept:
            if row.top_p >= 1.0 or not nucleus or before < row.top_p * slack * total:
                nucleus.append(t)
            before += mass[t]
        kept = sorted(t for t in nucleus if mass[t] > 0 and mass[t] >= row.min_p * slack)
        total, before = sum(mass[t] for t in kept), 0.0
        for t in kept:
            if before / total - EPSILON <= u <= (before + mass[t]) / total + EPSILON:
                ids.add(t)
            before += mass[t]
    return ids


@st.composite
def rows(draw: st.DrawFn, vocabulary: int) -> SamplingRow:
    ids = st.lists(st.integers(0, vocabulary - 1), max_size=5)
    some = st.booleans()

    def array(values: list[Any]) -> np.ndarray:
        return np.array(values, dtype=np.int64)

    bias = draw(
        st.dictionaries(st.integers(0, vocabulary - 1), st.sampled_from([-3.0, 0.5, 8.0]), min_size=1, max_size=3)
    )
    with_bias = draw(some)
    allowed = np.array(draw(st.lists(st.booleans(), min_size=vocabulary, max_size=vocabulary)))
    return SamplingRow(
        temperature=draw(st.sampled_from([0.0, 0.3, 1.0, 2.0])),
        top_k=draw(st.sampled_from([0, 1, 3, 100])),
        top_p=draw(st.sampled_from([1.0, 0.9, 0.4, 1e-6])),
        min_p=draw(st.sampled_from([0.0, 0.1, 0.6])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.7, 0.6])),
        presence_penalty=draw(st.sampled_from([0.0, 0.0, 1.5])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.0, 0.7, -0.3])),
        logprobs=draw(st.sampled_from([-1, -1, 0, 5])),
        bias_ids=array(list(bias)) if with_bias else None,
        bias_values=np.array(list(bias.values()), dtype=np.float32) if with_bias else None,
        allowed=allowed if allowed.any() and draw(some) else None,
        prompt_ids=array(draw(ids)),
        output_ids=array(draw(ids)),
        forbidden_ids=array([0, vocabulary // 2]) if draw(some) and not (allowed.sum() < 3) else None,
        forbidden_until=draw(st.integers(0, 4)),
    )


@given(
    data=st.data(),
    vocabulary=st.integers(3, 24),
    count=st.integers(1, 5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    poison=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_sampled_id_is_where_its_uniform_falls_and_the_same_in_any_batch(
    data: st.DataObject, vocabulary: int, count: int, dtype: torch.dtype, poison: bool, seed: int
) -> None:
    draw = Draw(seed)
    requests = [data.draw(rows(vocabulary)) for _ in range(count)]
    slots = draw.generator.permutation(16)[:count].tolist()
    uniforms = draw.generator.random(count).astype(np.float32).tolist()
    logits = (draw.tensor(count, vocabulary) * 3).to(dtype)
    if poison:
        logits[:, 1] = torch.nan
    before = logits.clone()
    state = new_state(requests, vocabulary, slots=slots)
    out = draw_ids(logits, state, uniforms, slots)
    assert torch.equal(logits.nan_to_num(7.0), before.nan_to_num(7.0))
    assert (out.logprobs is not None) == any(r.logprobs >= 0 for r in requests)
    for i, row in enumerate(requests):
        scores = adjusted(f64(logits)[i], row)
        chosen = int(out.ids[i])
        if np.isfinite(scores).any():
            assert chosen in acceptable(scores, row, uniforms[i]), f"row {i}: id {chosen}, {row}"
            check_logprobs(out, i, scores)
        else:
            assert chosen == lowest_allowed(row, vocabulary)
        alone = draw_ids(logits[i : i + 1], new_state([row], vocabulary), [uniforms[i]])
        assert int(alone.ids[0]) == chosen
        assert int(state.last_tokens()[slots[i]]) == chosen


def lowest_allowed(row: SamplingRow, vocabulary: int) -> int:
    allowed = np.ones(vocabulary, dtype=bool) if row.allowed is None else row.allowed.copy()
    produced = 0 if row.output_ids is None else len(row.output_ids)
    if row.forbidden_ids is not None and produced < row.forbidden_until:
        allowed[row.forbidden_ids] = False
    return int(np.argmax(allowed))


def check_logprobs(out: SampleOutput, i: int, scores: np.ndarray) -> None:
    if out.logprobs is None or out.top_ids is None or out.top_logprobs is None:
        return
    expected = scores - scores.max()
    expected = expected - math.log(np.exp(expected).sum())
    order = sorted(range(len(scores)), key=lambda t: (-scores[t], t))[:5]
    tolerance = 2e-5 * (1 + np.abs(scores[np.isfinite(scores)]).max())

    def close(got: float, wanted: float) -> bool:
        return got == wanted or abs(got - wanted) <= tolerance

    assert close(float(out.logprobs[i]), expected[int(out.ids[i])])
    assert out.top_ids.shape[1] == out.top_logprobs.shape[1] == 5
    for column in range(5):
        got = float(out.top_logprobs[i, column])
        if column < len(order):
            # Rounding of the scores themselves may exchange neighbours.
            assert close(got, expected[order[column]])
            assert close(got, expected[int(out.top_ids[i, column])])
        else:
            assert (int(out.top_ids[i, column]), got) == (-1, -math.inf)


# -- exact cases -----------------------------------------------------------------------------------------------------


def test_equal_logits_split_the_unit_interval_exactly() -> None:
    state = new_state([SamplingRow()] * 16, 8)
    below = [float(np.nextafter(np.float32((k + 1) / 8), np.float32(0))) for k in range(8)]
    out = draw_ids(torch.full((16, 8), 3.5), state, [k / 8 for k in range(8)] + below)
    assert out.ids.tolist() == [*range(8), *range(8)]


def test_a_uniform_that_was_rounded_up_to_one_gives_the_last_id_with_any_mass() -> None:
    logits = torch.tensor([[0.0, 1.0, 0.5, -torch.inf, -1000.0]])
    assert draw_ids(logits, new_state([SamplingRow()], 5), [1.0]).ids.tolist() == [2]


def test_ties_keep_the_lowest_ids_in_every_filter() -> None:
    last = 1.0 - 2**-24
    requests = [
        SamplingRow(top_k=3),
        SamplingRow(top_p=0.5),
        SamplingRow(temperature=0.0),
        SamplingRow(top_k=4, top_p=0.5),
    ]
    out = draw_ids(torch.zeros(4, 8), new_state(requests, 8), [last] * 4)
    assert out.ids.tolist() == [2, 3, 0, 1]


def test_top_p_counts_what_top_k_left() -> None:
    # Mass 4, 2, 1, 1: top-k keeps 4 and 2, of which half the mass is the first alone.
    logits = torch.log(torch.tensor([[1.0, 4.0, 2.0, 1.0]]))
    state = new_state([SamplingRow(top_k=2, top_p=0.6), SamplingRow(top_p=0.6)], 4)
    assert draw_ids(logits.expand(2, -1), state, [0.999, 0.999]).ids.tolist() == [1, 2]


def test_repetition_counts_the_prompt_but_presence_and_frequency_do_not() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0]])
    prompt = np.array([0])
    greedy = SamplingRow(temperature=0.0, prompt_ids=prompt)
    requests = [
        replace(greedy, repetition_penalty=2.0),
        replace(greedy, presence_penalty=2.0),
        replace(greedy, frequency_penalty=2.0),
        replace(greedy, presence_penalty=1.5, output_ids=prompt),
        replace(greedy, frequency_penalty=0.75, output_ids=np.array([0, 0])),
    ]
    assert draw_ids(logits.expand(5, -1), new_state(requests, 3), [0.0] * 5).ids.tolist() == [1, 0, 0, 1, 1]


def test_repetition_pushes_negative_logits_down() -> None:
    logits = torch.tensor([[-1.0, -1.5]])
    row = SamplingRow(temperature=0.0, repetition_penalty=2.0, prompt_ids=np.array([0]))
    assert draw_ids(logits, new_state([row], 2), [0.0]).ids.tolist() == [1]


def test_sampled_ids_are_counted_for_the_next_step() -> None:
    logits = torch.tensor([[1.0, 0.5, 0.0]])
    state = new_state([SamplingRow(temperature=0.0, frequency_penalty=0.3)], 3)
    assert [int(draw_ids(logits, state, [0.0]).ids[0]) for _ in range(7)] == [0, 0, 1, 0, 1, 0, 2]


def test_leftover_counts_of_other_requests_do_not_reach_a_row_without_penalties() -> None:
    state = new_state(
        [SamplingRow(temperature=0.0, presence_penalty=5.0), SamplingRow(temperature=0.0, presence_penalty=5.0)], 2
    )
    logits = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    draw_ids(logits, state, [0.0, 0.0])
    state.write(1, SamplingRow(temperature=0.0))
    assert draw_ids(logits, state, [0.0, 0.0]).ids.tolist() == [1, 0]


@pytest.mark.parametrize("produced", [0, 1, 2, 5])
def test_forbidden_ids_come_back_after_enough_outputs(produced: int) -> None:
    allowed = np.array([True, True, True, False])
    row = SamplingRow(
        temperature=0.0,
        allowed=allowed,
        forbidden_ids=np.array([0, 1]),
        forbidden_until=2,
        output_ids=np.zeros(produced, dtype=np.int64),
    )
    state, logits = new_state([row], 4), torch.tensor([[2.0, 1.0, 0.0, 9.0]])
    ids = [int(draw_ids(logits, state, [0.0]).ids[0]) for _ in range(4)]
    left = max(0, 2 - produced)
    assert ids == [2] * left + [0] * (4 - left)


def test_a_row_without_any_usable_logit_takes_its_lowest_allowed_id() -> None:
    allowed = np.array([False, False, True, True])
    requests = [
        SamplingRow(),
        SamplingRow(allowed=allowed),
        SamplingRow(allowed=np.zeros(4, dtype=bool)),
        SamplingRow(temperature=0.0),
    ]
    requests = [replace(r, logprobs=0) for r in requests]
    logits = torch.full((4, 4), torch.nan)
    logits[1, 2] = -torch.inf
    out = draw_ids(logits, new_state(requests, 4), [0.9] * 4)
    assert out.ids.tolist() == [0, 2, 0, 0]
    assert out.logprobs is not None
    assert out.logprobs.tolist() == [-math.inf] * 4


def test_not_a_number_is_never_sampled_and_infinity_always_is() -> None:
    logits = torch.tensor([[torch.nan, 1.0, 2.0], [0.0, torch.inf, 1.0]])
    for temperature in (0.0, 1.0, 1e-6):
        state = new_state([SamplingRow(temperature=temperature, top_k=1)] * 2, 3)
        assert draw_ids(logits, state, [0.0, 0.99]).ids.tolist() == [2, 1]


@pytest.mark.parametrize(
    "other", [SamplingRow(), SamplingRow(top_p=0.5, repetition_penalty=1.3), SamplingRow(logprobs=3)]
)
def test_a_greedy_row_gives_the_same_id_beside_any_other(other: SamplingRow) -> None:
    logits = Draw(4).tensor(2, 50, dtype=torch.bfloat16)
    logits[0, [7, 30]] = 100.0
    greedy = SamplingRow(temperature=0.0)
    alone = draw_ids(logits[:1], new_state([greedy], 50), [0.0]).ids
    both = draw_ids(logits, new_state([greedy, other], 50), [0.0, 0.5]).ids
    assert alone[0] == both[0] == 7


def test_a_large_vocabulary_samples_alike_in_any_batch() -> None:
    draw = Draw(9)
    logits = draw.tensor(6, 50_000) * 2
    requests = [
        SamplingRow(),
        SamplingRow(top_p=0.9),
        SamplingRow(top_k=40),
        SamplingRow(min_p=0.05),
        SamplingRow(temperature=0.2, logprobs=2),
    ]
    requests.append(SamplingRow(temperature=0.0))
    uniforms = draw.generator.random(6).astype(np.float32).tolist()
    together = draw_ids(logits, new_state(requests, 50_000), uniforms)
    for i, row in enumerate(requests):
        alone = draw_ids(logits[i : i + 1], new_state([row], 50_000), uniforms[i : i + 1])
        assert alone.ids[0] == together.ids[i]
        assert together.logprobs is not None
        assert alone.logprobs is None or torch.equal(alone.logprobs[0], together.logprobs[i])


def test_operands_outside_the_contract_are_refused() -> None:
    state = new_state([SamplingRow()], 4)
    with pytest.raises(OperatorError, match=r"\[1, 4\]"):
        draw_ids(torch.zeros(1, 5), state, [0.0])

    class Other(SamplingState):
        def write(self, slot: int, row: SamplingRow) -> None: ...

        def clear(self, slot: int) -> None: ...

        def last_tokens(self) -> torch.Tensor:
            return torch.zeros(1)

    with pytest.raises(OperatorError, match="Other"):
        sample(torch.zeros(1, 4), Other(), step_of(step_input(sample_slots=[0], uniforms=[0.0])))


def test_no_rows_give_no_ids() -> None:
    assert draw_ids(torch.zeros(0, 4), new_state([SamplingRow()], 4), []).ids.shape == (0,)
