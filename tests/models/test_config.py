from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from polyaccel.backend.errors import ModelLoadError
from polyaccel.models.config import ModelConfig
from polyaccel.models.rope_config import RopeConfig

BASE: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 100,
    "max_position_embeddings": 256,
}
CLASSES: dict[str, type[Any]] = {
    "LlamaForCausalLM": transformers.LlamaConfig,
    "MistralForCausalLM": transformers.MistralConfig,
    "Qwen2ForCausalLM": transformers.Qwen2Config,
    "Qwen3ForCausalLM": transformers.Qwen3Config,
    "MixtralForCausalLM": transformers.MixtralConfig,
}
ROPES: dict[str, dict[str, object]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "llama3 wide": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 0.5,
        "high_freq_factor": 6.0,
        "original_max_position_embeddings": 128,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096},
    "yarn with betas": {
        "rope_type": "yarn",
        "factor": 40.0,
        "beta_fast": 24,
        "beta_slow": 2,
        "original_max_position_embeddings": 2048,
    },
    "yarn with mscale": {
        "rope_type": "yarn",
        "factor": 40.0,
        "mscale": 0.707,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
    },
    "yarn with attention factor": {
        "rope_type": "yarn",
        "factor": 2.0,
        "attention_factor": 1.25,
        "original_max_position_embeddings": 4096,
    },
    "yarn without truncation": {
        "rope_type": "yarn",
        "factor": 4.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
}


def config(**changes: object) -> ModelConfig:
    merged = {**BASE, **changes}
    return ModelConfig.from_hf({key: value for key, value in merged.items() if value is not ...})


@pytest.mark.parametrize("architecture", CLASSES)
def test_a_configuration_as_transformers_writes_it_is_read_alike(architecture: str) -> None:
    values = {key: value for key, value in BASE.items() if key != "architectures"}
    theirs = CLASSES[architecture](**values, dtype="bfloat16", eos_token_id=[2, 3], bos_token_id=1)
    theirs.architectures = [architecture]
    ours = ModelConfig.from_hf(theirs.to_dict(), {"eos_token_id": [3, 5]})
    assert (ours.hidden_size, ours.num_layers, ours.num_heads, ours.num_kv_heads) == (64, 4, 4, 2)
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 16)
    assert (ours.intermediate_size, ours.vocab_size, ours.max_position_embeddings) == (128, 100, 256)
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    assert ours.tie_embeddings == theirs.tie_word_embeddings
    assert (ours.dtype, ours.bos_token_id, ours.eos_token_ids) == (torch.bfloat16, 1, (3, 5, 2))
    assert ours.architectures == (architecture,)
    if architecture == "MixtralForCausalLM":
        assert (ours.num_experts, ours.experts_per_token, ours.norm_topk_prob) == (8, 2, True)
    else:
        assert (ours.num_experts, ours.experts_per_token, ours.norm_topk_prob) == (0, 0, False)


@pytest.mark.parametrize("architecture", CLASSES)
def test_bias_and_norm_flags_match_the_parameters_that_transformers_makes(architecture: str) -> None:
    values = {key: value for key, value in BASE.items() if key != "architectures"}
    for bias in (False, True):
        theirs = CLASSES[architecture](**values, attention_bias=bias, mlp_bias=bias, num_local_experts=2)
        theirs.architectures = [architecture]
        with torch.device("meta"):
            model = getattr(transformers, architecture)(theirs)
        names = {name for name, _ in model.named_parameters()}
        ours = ModelConfig.from_hf(theirs.to_dict())
        layer = "model.layers.0"
        assert ours.qkv_bias == (f"{layer}.self_attn.q_proj.bias" in names)
        assert ours.o_bias == (f"{layer}.self_attn.o_proj.bias" in names)
        assert ours.mlp_bias == (f"{layer}.mlp.down_proj.bias" in names)
        assert ours.qk_norm == (f"{layer}.self_attn.q_norm.weight" in names)


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_rotary_frequencies_equal_those_of_transformers(rope: str, head_dim: int, theta: float) -> None:
    parameters = {**ROPES[rope], "rope_theta": theta}
    theirs = transformers.LlamaConfig(
        head_dim=head_dim, max_position_embeddings=131072, rope_parameters=dict(parameters)
    )
    expected, attention_factor = ROPE_INIT_FUNCTIONS[str(parameters["rope_type"])](theirs, torch.device("cpu"))
    for shape in ("rope_parameters", "rope_scaling"):
        raw: dict[str, object] = {"max_position_embeddings": 131072, shape: parameters}
        ours = RopeConfig.from_hf(raw, head_dim=head_dim, default_theta=1.0)
        assert ours.inv_freq().dtype == np.float64
        np.testing.assert_allclose(ours.inv_freq(), expected.double().numpy(), rtol=2e-6)
        assert ours.attention_factor == pytest.approx(attention_factor, rel=1e-12)
        assert (ours.theta, ours.rotary_dim, ours.style) == (theta, head_dim, "half")


def test_rope_values_of_older_configurations_are_read() -> None:
    scaling = {"type": "linear", "factor": 2.0}
    rope = config(rope_theta=500000.0, rope_scaling=scaling).rope
    assert (rope.scaling, rope.factor, rope.theta) == ("linear", 2.0, 500000.0)
    assert config(rope_scaling=None, rope_theta=777.0).rope == RopeConfig(theta=777.0, rotary_dim=16)
    assert config(rope_parameters={"rope_type": "default", "rope_theta": 5.0}).rope.theta == 5.0


def test_plain_frequencies_fall_from_one_by_powers_of_theta() -> None:
    frequencies = RopeConfig(theta=100.0, rotary_dim=4).inv_freq()
    assert frequencies == pytest.approx([1.0, 0.1])


def test_a_part_of_the_head_can_be_rotated() -> None:
    assert config(partial_rotary_factor=0.5).rope.rotary_dim == 8
    assert config(rope_parameters={"partial_rotary_factor": 0.25}).rope.inv_freq().shape == (2,)


def test_factors_divide_the_frequencies() -> None:
    factors = [1.0, 2.0, 4.0, 8.0, 1.0, 1.0, 1.0, 1.0]
    rope = config(rope_scaling={"rope_type": "factors", "factors": factors}).rope
    assert rope.inv_freq() == pytest.approx(RopeConfig(theta=10000.0, rotary_dim=16).inv_freq() / np.array(factors))
    with pytest.raises(ModelLoadError, match="'factors' has 2 values, expected 8"):
        config(rope_scaling={"rope_type": "factors", "factors": [1.0, 2.0]})


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "su", "proportional", "axial", "nonsense"])
def test_an_unknown_rope_kind_is_refused_by_name(kind: str) -> None:
    with pytest.raises(ModelLoadError, match=f"rope_type '{kind}' is not supported"):
        config(rope_scaling={"rope_type": kind, "factor": 2.0})


def test_rope_that_differs_between_layers_is_refused() -> None:
    nested = {"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": "default"}}
    with pytest.raises(ModelLoadError, match="differs between layer types"):
        config(rope_parameters=nested)


@pytest.mark.parametrize(
    ("architecture", "changes", "windows"),
    [
        ("MistralForCausalLM", {"sliding_window": 4096}, (4096,) * 4),
        ("MistralForCausalLM", {"sliding_window": None}, (None,) * 4),
        ("MistralForCausalLM", {}, (4096,) * 4),
        ("MixtralForCausalLM", {}, (None,) * 4),
        ("MixtralForCausalLM", {"sliding_window": 7}, (7,) * 4),
        ("LlamaForCausalLM", {"sliding_window": 4096}, (None,) * 4),
        ("Qwen2ForCausalLM", {"sliding_window": 64}, (None,) * 4),
        ("Qwen2ForCausalLM", {"sliding_window": 64, "use_sliding_window": False, "max_window_layers": 0}, (None,) * 4),
        (
            "Qwen2ForCausalLM",
            {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 3},
            (None, None, None, 64),
        ),
        (
            "Qwen3ForCausalLM",
            {
                "sliding_window": 9,
                "use_sliding_window": True,
                "layer_types": ["full_attention", "sliding_attention"] * 2,
            },
            (None, 9, None, 9),
        ),
    ],
)
def test_sliding_windows_are_those_of_transformers(
    architecture: str, changes: dict[str, object], windows: tuple[int | None, ...]
) -> None:
    assert config(architectures=[architecture], **changes).sliding_windows == windows
    values = {key: value for key, value in {**BASE, **changes}.items() if key != "architectures"}
    theirs = CLASSES[architecture](**values)
    kinds = getattr(theirs, "layer_types", None) or ["sliding_attention"] * 4
    window = getattr(theirs, "sliding_window", None) if architecture != "LlamaForCausalLM" else None
    assert windows == tuple(window if kind == "sliding_attention" else None for kind in kinds)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"layer_types": ["full_attention"]}, "expected 4 times"),
        ({"layer_types": ["full_attention", "linear_attention"] * 2}, "linear_attention"),
        ({"layer_types": ["sliding_attention"] * 4}, "no 'sliding_window' in use"),
        ({"use_sliding_window": True, "sliding_window": 0}, "'sliding_window' is 0"),
    ],
)
def test_layer_types_that_cannot_be_are_refused(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(ModelLoadError, match=reason):
        config(architectures=["Qwen2ForCausalLM"], **changes)


@pytest.mark.parametrize(
    "key",
    [
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "vocab_size",
        "max_position_embeddings",
    ],
)
@pytest.mark.parametrize("value", [0, -1, 2**40, 1.5, "8", True, [8], ..., None])
def test_a_dimension_out_of_range_is_refused_by_name_and_value(key: str, value: object) -> None:
    with pytest.raises(ModelLoadError, match=f"'{key}' is"):
        config(**{key: value})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_key_value_heads": 3}, "'num_attention_heads' 4 is not a multiple of 'num_key_value_heads' 3"),
        ({"num_key_value_heads": 0}, "'num_key_value_heads' is 0"),
        ({"hidden_size": 66}, "'hidden_size' 66 is not a multiple"),
        ({"head_dim": 15}, "15 of a head's 15 elements"),
        ({"head_dim": 10**6}, "'head_dim' is 1000000"),
        ({"hidden_act": "gelu"}, "'hidden_act' is 'gelu'"),
        ({"rms_norm_eps": math.nan}, "'rms_norm_eps' is nan"),
        ({"rms_norm_eps": -1e-5}, "'rms_norm_eps' is -1e-05"),
        ({"rope_theta": 0}, "'rope_theta' is 0"),
        ({"rope_theta": math.inf}, "'rope_theta' is inf"),
        ({"rope_theta": 10**400}, "'rope_theta' is 1000"),
        ({"rope_scaling": [1]}, "'rope_scaling' is list"),
        ({"rope_scaling": {"type": "linear"}}, "'rope_scaling.factor' is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "'rope_scaling.factor' is 0"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "'rope_scaling.factor' is 2, expected a number"),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}},
            "'high_freq_factor' 4.0 must be greater",
        ),
        ({"partial_rotary_factor": 1.5}, "'partial_rotary_factor' is 1.5"),
        ({"partial_rotary_factor": 0.01}, "0 of a head's 16 elements"),
        ({"eos_token_id": 100}, "'eos_token_id' is 100, expected token ids from 0 to 99"),
        ({"eos_token_id": [1, "2"]}, "'eos_token_id'"),
        ({"bos_token_id": -1}, "'bos_token_id' is -1"),
        ({"tie_word_embeddings": "yes"}, "'tie_word_embeddings' is yes"),
        ({"dtype": "float64"}, "'dtype' is 'float64'"),
        ({"dtype": ..., "torch_dtype": "float8_e4m3fn"}, "'float8_e4m3fn'"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "'quantization_config' names the method 'awq'"),
        ({"quantization_config": {}}, "'quantization_config'"),
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel.*LlamaForCausalLM, MistralForCausalLM"),
        ({"architectures": ["LlamaForCausalLM", "Other"]}, "'Other'"),
        ({"architectures": [7]}, "'architectures'"),
        ({"architectures": []}, "no 'architectures'"),
        ({"architectures": None, "model_type": "bert"}, "'bert' is not supported"),
        ({"architectures": ["MixtralForCausalLM"], "num_local_experts": 2, "num_experts_per_tok": 3}, "greater than"),
        ({"architectures": ["MixtralForCausalLM"], "num_local_experts": 0}, "'num_local_experts' is 0"),
    ],
)
def test_a_value_that_cannot_work_is_refused_by_name(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(ModelLoadError, match=reason):
        config(**changes)


def test_a_model_type_stands_in_for_missing_architectures() -> None:
    assert config(architectures=..., model_type="qwen3", head_dim=32).family == "qwen3"


def test_both_names_of_the_dtype_are_read() -> None:
    assert config().dtype == torch.float32
    assert config(dtype="float16").dtype == torch.float16
    assert config(torch_dtype="bfloat16").dtype == torch.bfloat16
    assert config(torch_dtype="torch.bfloat16").dtype == torch.bfloat16


def test_end_of_sequence_ids_are_merged_without_repeats() -> None:
    merged = ModelConfig.from_hf({**BASE, "eos_token_id": 7}, {"eos_token_id": [9, 7, 9], "bos_token_id": 3})
    assert (merged.eos_token_ids, merged.bos_token_id) == ((9, 7), 3)
    assert config().eos_token_ids == ()
    with pytest.raises(ModelLoadError, match=r"'generation_config\.eos_token_id' is 100"):
        ModelConfig.from_hf(BASE, {"eos_token_id": 100})


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        config().hidden_size = 3  # type: ignore[misc]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = [
    *BASE,
    "head_dim",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "eos_token_id",
    "dtype",
    "layer_types",
    "sliding_window",
    "use_sliding_window",
    "quantization_config",
    "rms_norm_eps",
    "num_local_experts",
    "tie_word_embeddings",
    "original_max_position_embeddings",
]
ROPE_KEYS = ["type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "mscale",
             "original_max_position_embeddings", "attention_factor", "truncate", "factors"]  # fmt: skip
ROPE = st.builds(
    lambda kind, rest: {**rest, "rope_type": kind},
    st.sampled_from(["default", "linear", "llama3", "yarn", "factors"]),
    st.dictionaries(st.sampled_from(ROPE_KEYS), JSON | st.floats(0, 100) | st.integers(0, 100), max_size=6),
)


@given(
    architecture=st.sampled_from([*CLASSES]),
    changes=st.dictionaries(st.sampled_from(KEYS), JSON | st.integers(0, 200), max_size=4),
    rope=st.none() | ROPE,
)
def test_any_configuration_is_read_or_refused(
    architecture: str, changes: dict[str, object], rope: dict[str, object] | None
) -> None:
    raw = {**BASE, "architectures": [architecture], "rope_scaling": rope, **changes}
    try:
        ours = ModelConfig.from_hf(raw, changes)
    except ModelLoadError:
        return
    assert ours.rope.inv_freq().shape == (ours.rope.rotary_dim // 2,)
    assert np.isfinite(ours.rope.inv_freq()).all()
    assert len(ours.sliding_windows) == ours.num_layers
