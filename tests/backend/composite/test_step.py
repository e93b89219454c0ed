from __future__ import annotations

import numpy as np
import pytest
import torch

from polyaccel.backend.composite.sampling_state import TensorSamplingState
from polyaccel.backend.errors import OperatorError
from polyaccel.backend.sampling import SamplingSpec
from polyaccel.backend.step import DEVICE_ARRAYS
from tests.backend.composite.cases import CPU, NoReadback, step_input, step_of


def test_every_array_arrives_with_its_values_and_dtype() -> None:
    inputs = step_input(
        [(1, 3), (2, 2)],
        token_ids=[5, 6, 7],
        positions=[2, 0, 1],
        logits_rows=[0, 2],
        sample_slots=[1, 0],
        uniforms=[0.5, 0.25],
    )
    step = step_of(inputs)
    for name in DEVICE_ARRAYS:
        expected = getattr(inputs, name)
        got = step.tensor(name)
        assert got.numpy().dtype == expected.dtype
        assert np.array_equal(got.numpy(), expected), name
        assert step.tensor(name) is got


def test_an_unknown_array_is_refused() -> None:
    with pytest.raises(OperatorError, match="no array 'input'"):
        step_of(step_input()).tensor("input")


@pytest.mark.parametrize("token_ids", [[-1, -4, -2], [9, -3, 8], [1, 2, 3]])
def test_token_sources_become_the_last_sampled_ids(token_ids: list[int]) -> None:
    sampling = TensorSamplingState(SamplingSpec(request_slots=4, vocabulary=100), CPU)
    sampling.last_tokens().copy_(torch.tensor([10, 20, 30, 40]))
    step = step_of(step_input([(1, 1)] * 3, token_ids=token_ids), sampling=sampling)
    expected = [t if t >= 0 else 10 * -t for t in token_ids]
    with NoReadback(uploads=True):
        ids = step.tensor("token_ids")
    assert ids.tolist() == expected


def test_a_source_without_sampling_state_is_refused() -> None:
    with pytest.raises(OperatorError, match="sampling state"):
        step_of(step_input([(1, 1)], token_ids=[-1])).tensor("token_ids")


def test_adapter_triples_arrive_as_indices_and_weights() -> None:
    step = step_of(step_input([(1, 1)] * 3, adapters={"tokens": [(2, 1, 0.5), (0, 3, 1.0), (1, 1, 2.0)]}))
    rows, slots, weights = step.adapter_tensors("tokens")
    assert (rows.dtype, slots.dtype, weights.dtype) == (torch.int64, torch.int64, torch.float32)
    assert rows.tolist() == [1, 2, 0]
    assert slots.tolist() == [1, 1, 3]
    assert weights.tolist() == [2.0, 0.5, 1.0]
    assert step.adapter_tensors("logits")[0].tolist() == []


@pytest.mark.parametrize(
    ("lengths", "adapters", "key"),
    [([(1, 1)], False, 0), ([(1, 1)], True, 1), ([(2, 2)], False, 2), ([(2, 2)], True, 3)],
)
def test_the_plan_key_names_class_and_adapters(lengths: list[tuple[int, int]], adapters: bool, key: int) -> None:
    triples = {"tokens": [(0, 0, 1.0)]} if adapters else None
    assert step_of(step_input(lengths, adapters=triples)).plan_key == key  # type: ignore[arg-type]
