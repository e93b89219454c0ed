from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyaccel.backend.composite.sampling import sample as sample_in_full
from polyaccel.backend.cpu.sampling import argmax
from polyaccel.backend.sampling import SamplingRow, SamplingSpec
from tests.backend.composite.cases import Draw, step_input
from tests.backend.cpu.machine import Machine

SPECIAL = (float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 3.4e38)


@given(
    rows=st.integers(1, 5),
    vocabulary=st.sampled_from([1, 7, 32, 96, 256, 640, 1000]),
    special=st.sampled_from(SPECIAL),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    coarse=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**32 - 1),
)
def test_plain_greedy_rows_are_sampled_as_by_the_composite(
    rows: int, vocabulary: int, special: float, share: float, coarse: bool, dtype: torch.dtype, seed: int
) -> None:
    draw, machine = Draw(seed), Machine()
    logits = draw.tensor(rows, vocabulary + 3, dtype=dtype)[:, :vocabulary]
    if coarse:
        # Many equal values: the lowest id wins.
        logits = logits.round()
    logits = torch.where(torch.from_numpy(draw.generator.random((rows, vocabulary)) < share), special, logits)
    device = machine.backend.devices()[0]
    spec = SamplingSpec(request_slots=rows + 1, vocabulary=vocabulary)
    results = []
    for sample in (machine.operator("sample"), sample_in_full):
        state = machine.backend.allocate_sampling(spec, device)
        for slot in range(1, rows + 1):
            state.write(slot, SamplingRow(temperature=0.0))
        inputs = step_input(tokens=rows, sample_slots=range(rows, 0, -1), uniforms=[0.0] * rows)
        results.append((sample(logits, state, machine.begin(inputs, sampling=state)).ids, state.last_tokens()))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_rows_that_ask_for_more_than_greedy_take_the_full_way() -> None:
    machine, logits = Machine(), torch.tensor([[0.0, 1.0, 2.0, 3.0]] * 2)
    device = machine.backend.devices()[0]
    state = machine.backend.allocate_sampling(SamplingSpec(request_slots=2, vocabulary=4), device)
    state.write(0, SamplingRow(temperature=0.0, logprobs=1))
    state.write(1, SamplingRow(temperature=1.0))
    inputs = step_input(tokens=2, sample_slots=[0, 1], uniforms=[0.0, 0.0])
    out = machine.operator("sample")(logits, state, machine.begin(inputs, sampling=state))
    assert out.ids.tolist() == [3, 0]
    assert out.logprobs is not None


def test_no_rows_give_no_ids() -> None:
    machine = Machine()
    device = machine.backend.devices()[0]
    state = machine.backend.allocate_sampling(SamplingSpec(request_slots=1, vocabulary=64), device)
    step = machine.begin(step_input(), sampling=state)
    assert machine.operator("sample")(torch.zeros(0, 64), state, step).ids.tolist() == []


def test_the_largest_of_a_wide_row_is_found_in_its_last_column() -> None:
    scores = np.full((2, 49152), -5.0, dtype=np.float32)
    scores[0, -1], scores[1, 255] = 1.0, 1.0
    assert argmax(torch.from_numpy(scores)).tolist() == [49151, 255]
