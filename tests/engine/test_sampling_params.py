"""Which values are refused, and what the accepted ones become."""

from __future__ import annotations

import math

import pytest

from polyaccel.backend.errors import RequestRejected
from polyaccel.engine.sampling_params import SamplingParams

WRONG = [
    ("temperature", [-0.1, math.nan, math.inf, "1", None, True, 10**400]),
    ("top_p", [0.0, -1, 1.01, math.nan, "a", False]),
    ("top_k", [-1, 1.0, True, None, "5"]),
    ("min_p", [-0.01, 1.01, math.nan, True]),
    ("max_tokens", [0, -5, 1.5, True, "7"]),
    ("min_tokens", [-1, 0.0, None, True]),
    ("stop", ["", [""], ["a", 3], 5, [None]]),
    ("stop_token_ids", [[-1], [1.0], [True], 3, "12"]),
    ("seed", [-1, 2**64, 1.0, True, "0"]),
    ("n", [0, -1, 129, 1.0, True]),
    ("logprobs", [-1, 21, 1.0, True]),
    ("presence_penalty", [-2.1, 2.1, math.nan, "0"]),
    ("frequency_penalty", [-2.1, 2.1, math.inf, None]),
    ("repetition_penalty", [0.0, -1.0, math.nan, math.inf, True]),
    ("ignore_eos", [0, 1, None, "yes"]),
    ("logit_bias", [{-1: 1.0}, {1: 101}, {1: math.nan}, {"1": 1.0}, {True: 1.0}, {1: None}, [1]]),
    ("allowed_token_ids", [[], [-1], [1.5], "abc", 4]),
    ("include_stop_str_in_output", [1, None]),
    ("skip_special_tokens", [0, "no"]),
]


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in WRONG for value in values])
def test_a_wrong_value_is_refused_with_field_and_value(field: str, value: object) -> None:
    with pytest.raises(RequestRejected) as caught:
        SamplingParams(**{field: value})  # type: ignore[arg-type]
    assert str(caught.value).startswith(f"{field}=")


def test_min_tokens_above_max_tokens_is_refused() -> None:
    with pytest.raises(RequestRejected, match=r"min_tokens=5 .*max_tokens, which is 4"):
        SamplingParams(min_tokens=5, max_tokens=4)


def test_the_limits_themselves_are_accepted() -> None:
    params = SamplingParams(temperature=0, top_p=1, top_k=0, min_p=1, max_tokens=1, min_tokens=1, seed=2**64 - 1, n=128)
    assert (params.seed, params.n, params.min_p) == (2**64 - 1, 128, 1.0)
    params = SamplingParams(presence_penalty=-2, frequency_penalty=2, repetition_penalty=1e-3, logprobs=20, seed=0)
    assert (params.presence_penalty, params.repetition_penalty, params.logprobs) == (-2.0, 1e-3, 20)


def test_values_are_normalised_and_copied() -> None:
    ids, bias = [1, 2], {3: 1}
    params = SamplingParams(temperature=0, stop="end", stop_token_ids=ids, logit_bias=bias, allowed_token_ids={4})
    ids.append(9)
    bias[9] = 9
    assert isinstance(params.temperature, float)
    assert params.stop_strings == params.stop == ("end",)
    assert params.stop_ids == (1, 2)
    assert params.logit_bias == {3: 1.0}
    assert params.allowed_token_ids == (4,)
    assert SamplingParams(stop=["a", "b"]).stop_strings == ("a", "b")
    assert SamplingParams().stop_strings == ()
    assert SamplingParams(logit_bias={}).logit_bias is None


def test_params_cannot_be_changed_and_take_keywords_only() -> None:
    params = SamplingParams()
    with pytest.raises(AttributeError):
        params.top_k = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        SamplingParams(0.5)  # type: ignore[misc]


@pytest.mark.parametrize("field", ["presence_penalty", "frequency_penalty"])
def test_penalties_are_noticed(field: str) -> None:
    assert SamplingParams(**{field: 0.5}).has_penalties  # type: ignore[arg-type]
    assert SamplingParams(repetition_penalty=1.1).has_penalties
    assert not SamplingParams().has_penalties
