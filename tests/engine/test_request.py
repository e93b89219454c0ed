"""The sampling state that a request starts with."""

from __future__ import annotations

import numpy as np

from polyaccel.engine.intake import Intake
from polyaccel.engine.request import Sequence, sampling_row
from polyaccel.engine.sampling_params import SamplingParams


def sequence(params: SamplingParams, output: tuple[int, ...] = ()) -> Sequence:
    intake = Intake(vocabulary=50, max_tokens=100, eos_token_ids=(7, 9, 7), seed=3)
    request = intake.request("r", [1, 2, 3], params, (), priority=0, watched=False, now=0.0)
    request.sequences[0].tokens = np.array([1, 2, 3, *output], dtype=np.int32)
    return request.sequences[0]


def test_a_plain_greedy_request_is_recognised_as_such() -> None:
    row = sampling_row(sequence(SamplingParams(temperature=0)), 50)
    assert row.is_plain_greedy
    assert (row.prompt_ids, row.output_ids, row.forbidden_ids, row.logprobs) == (None, None, None, -1)


def test_every_filter_is_passed_on() -> None:
    params = SamplingParams(
        temperature=0.5,
        top_k=4,
        top_p=0.25,
        min_p=0.125,
        repetition_penalty=1.5,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logprobs=3,
        seed=11,
    )
    row = sampling_row(sequence(params), 50)
    assert (row.temperature, row.top_k, row.top_p, row.min_p) == (0.5, 4, 0.25, 0.125)
    assert (row.repetition_penalty, row.presence_penalty, row.frequency_penalty) == (1.5, 0.5, -0.5)
    assert (row.logprobs, row.seed) == (3, 11)
    assert row.prompt_ids is not None
    assert row.prompt_ids.tolist() == [1, 2, 3]


def test_bias_and_allowed_ids_become_arrays() -> None:
    row = sampling_row(sequence(SamplingParams(logit_bias={4: 1.5, 2: -3}, allowed_token_ids=[2, 4])), 50)
    assert row.bias_ids is not None
    assert row.bias_values is not None
    assert row.allowed is not None
    assert (row.bias_ids.dtype, row.bias_values.dtype) == (np.int64, np.float32)
    assert dict(zip(row.bias_ids.tolist(), row.bias_values.tolist(), strict=True)) == {4: 1.5, 2: -3.0}
    assert np.flatnonzero(row.allowed).tolist() == [2, 4]
    assert row.allowed.shape == (50,)


def test_min_tokens_forbids_every_id_that_would_end_the_output() -> None:
    row = sampling_row(sequence(SamplingParams(min_tokens=4, stop_token_ids=[3, 9])), 50)
    assert row.forbidden_ids is not None
    assert row.forbidden_ids.tolist() == [7, 9, 3]
    assert row.forbidden_until == 4
    without = sampling_row(sequence(SamplingParams(min_tokens=4, ignore_eos=True)), 50)
    assert (without.forbidden_ids, without.forbidden_until) == (None, 0)


def test_a_sequence_that_returns_brings_its_output() -> None:
    row = sampling_row(sequence(SamplingParams(), output=(5, 6)), 50)
    assert row.output_ids is not None
    assert row.output_ids.tolist() == [5, 6]


def test_drawn_seeds_follow_the_engine_s_seed_and_the_order_of_arrival() -> None:
    def seeds(engine_seed: int) -> list[int]:
        intake = Intake(vocabulary=50, max_tokens=100, eos_token_ids=(), seed=engine_seed)
        params = SamplingParams()
        return [intake.request("r", [1], params, (), priority=0, watched=False, now=0.0).seed for _ in range(5)]

    assert seeds(1) == seeds(1)
    assert seeds(1) != seeds(2)
    assert len(set(seeds(1))) == 5
