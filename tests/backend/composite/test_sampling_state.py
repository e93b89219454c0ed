from __future__ import annotations

import numpy as np
import pytest
import torch

from polyaccel.backend.composite.sampling_state import PARAMETERS, TensorSamplingState
from polyaccel.backend.errors import OperatorError
from polyaccel.backend.sampling import SamplingRow, SamplingSpec
from tests.backend.composite.cases import CPU

SPEC = SamplingSpec(request_slots=3, vocabulary=6, max_top_logprobs=4)


def test_parameters_are_kept_by_slot() -> None:
    state = TensorSamplingState(SPEC, CPU)
    state.write(1, SamplingRow(temperature=0.5, top_k=7, top_p=0.25, min_p=0.125))
    row = dict(zip(PARAMETERS, state.parameters[1].tolist(), strict=True))
    assert (row["temperature"], row["top_k"], row["top_p"], row["min_p"]) == (0.5, 7.0, 0.25, 0.125)


def test_wide_tables_exist_only_once_a_request_needs_them() -> None:
    state = TensorSamplingState(SPEC, CPU)
    state.write(0, SamplingRow(temperature=0.7, top_k=3, prompt_ids=np.array([1]), output_ids=np.array([2])))
    assert state.output_counts is None
    assert state.bias is None
    assert state.allowed is None
    state.write(0, SamplingRow(presence_penalty=1.0, prompt_ids=np.array([1, 1]), output_ids=np.array([2, 5, 2])))
    assert state.output_counts is not None
    assert state.prompt_mask is not None
    assert state.output_counts[0].tolist() == [0, 0, 2, 0, 0, 1]
    assert state.prompt_mask[0].tolist() == [False, True, False, False, False, False]


def test_a_new_request_finds_nothing_of_the_last_one_in_its_slot() -> None:
    state = TensorSamplingState(SPEC, CPU)
    state.write(
        2,
        SamplingRow(
            frequency_penalty=1.0,
            output_ids=np.array([3]),
            prompt_ids=np.array([4]),
            bias_ids=np.array([1]),
            bias_values=np.array([2.0], dtype=np.float32),
            allowed=np.array([True] + [False] * 5),
        ),
    )
    state.clear(2)
    state.write(2, SamplingRow(repetition_penalty=1.5))
    assert state.output_counts is not None
    assert state.prompt_mask is not None
    assert state.bias is not None
    assert state.allowed is not None
    for table in (state.output_counts, state.prompt_mask, state.bias):
        assert not table[2].any()
    assert state.allowed[2].all()


def test_needs_are_those_of_the_slots_asked_for() -> None:
    state = TensorSamplingState(SPEC, CPU)
    state.write(0, SamplingRow(temperature=0.0))
    state.write(1, SamplingRow(temperature=1.0, top_p=0.5, logprobs=2))
    greedy, mixed = state.needs(np.array([0, 2])), state.needs(np.array([0, 1]))
    assert not any(greedy)
    assert (mixed.sampling, mixed.ordering, mixed.logprobs, mixed.penalties) == (True, True, True, False)
    state.clear(1)
    assert not any(state.needs(np.array([0, 1])))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (SamplingRow(prompt_ids=np.array([6])), "prompt_ids"),
        (SamplingRow(output_ids=np.array([-1])), "output_ids"),
        (SamplingRow(forbidden_ids=np.array([9]), forbidden_until=1), "forbidden_ids"),
        (SamplingRow(bias_ids=np.array([7]), bias_values=np.array([0.0])), "bias_ids"),
        (SamplingRow(bias_ids=np.array([1, 2]), bias_values=np.array([0.0])), "length"),
        (SamplingRow(bias_ids=np.array([1])), "length"),
        (SamplingRow(allowed=np.ones(5, dtype=bool)), "allowed"),
        (SamplingRow(logprobs=5), "logprobs"),
    ],
)
def test_a_row_that_does_not_fit_is_refused_and_leaves_the_slot_empty(row: SamplingRow, reason: str) -> None:
    state = TensorSamplingState(SPEC, CPU)
    state.write(0, SamplingRow(temperature=1.0))
    with pytest.raises(OperatorError, match=reason):
        state.write(0, row)
    assert not any(state.needs(np.array([0])))


@pytest.mark.parametrize("slot", [-1, 3])
def test_a_slot_outside_the_state_is_refused(slot: int) -> None:
    state = TensorSamplingState(SPEC, CPU)
    with pytest.raises(OperatorError, match="request slot"):
        state.write(slot, SamplingRow())
    with pytest.raises(OperatorError, match="request slot"):
        state.clear(slot)


def test_last_tokens_has_a_stable_address() -> None:
    state = TensorSamplingState(SPEC, CPU)
    last = state.last_tokens()
    state.advance(np.array([2, 0]), torch.tensor([2, 0]), torch.tensor([5, 3]), state.needs(np.array([2, 0])))
    assert state.last_tokens() is last
    assert last.tolist() == [3, 0, 5]


def test_a_request_with_neutral_filters_needs_none() -> None:
    state = TensorSamplingState(SPEC, CPU)
    state.write(0, SamplingRow(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0))
    needs = state.needs(np.array([0]))
    assert (needs.sampling, needs.ordering, needs.min_p, needs.penalties) == (True, False, False, False)
