from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from polyaccel.backend.errors import AdapterIncompatible
from polyaccel.lora.adapter_config import AdapterConfig

PLAIN: dict[str, object] = {"peft_type": "LORA", "r": 8, "lora_alpha": 16}


def parse(**fields: object) -> AdapterConfig:
    return AdapterConfig.parse(PLAIN | fields, "adapter_config.json")


def test_the_scale_is_alpha_over_the_true_rank() -> None:
    numbers = parse().numbers("model.layers.0.self_attn.q_proj", 8)
    assert (numbers.alpha, numbers.true_rank, numbers.padded_rank, numbers.shard_rank) == (16.0, 8, 8, 8)
    assert numbers.scale == 2.0


def test_rank_stabilised_scale_divides_by_the_root() -> None:
    assert parse(use_rslora=True).numbers("q_proj", 8).scale == 16 / math.sqrt(8)


def test_patterns_change_rank_and_alpha_of_the_modules_they_match() -> None:
    config = parse(rank_pattern={"k_proj": 3, r".*\.1\..*": 5}, alpha_pattern={"k_proj": 6.5})
    assert config.numbers("layers.0.k_proj", 3).scale == 6.5 / 3
    assert config.numbers("layers.1.v_proj", 5).scale == 16 / 5
    assert config.numbers("layers.0.v_proj", 8).scale == 2.0


def test_peft_defaults_hold_for_missing_fields() -> None:
    assert AdapterConfig.parse({"peft_type": "LORA"}, "x").numbers("m", 8).scale == 1.0


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"use_dora": True}, "DoRA"),
        ({"alora_invocation_tokens": [1]}, "aLoRA"),
        ({"bias": "all"}, "bias='all'"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"lora_bias": True}, "LoRA bias"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"trainable_token_indices": {"embed_tokens": [1]}}, "trainable_token_indices"),
        ({"layer_replication": [[0, 4], [2, 5]]}, "layer_replication"),
        ({"use_qalora": True}, "QA-LoRA"),
        ({"use_bdlora": {"nblocks": 2}}, "block-diagonal"),
        ({"arrow_config": {"top_k": 3}}, "Arrow"),
        ({"kasa_config": {"beta": 0.1}}, "KaSA"),
        ({"monteclora_config": {"num_samples": 8}}, "MonteCLoRA"),
        ({"velora_config": {"num_groups": 8}}, "VeLoRA"),
        ({"megatron_config": {"x": 1}}, "Megatron"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": "pissa_niter_16"}, "pissa_niter_16"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"init_lora_weights": "corda"}, "corda"),
        ({"init_lora_weights": "loftq"}, "loftq"),
        ({"init_lora_weights": "lora_ga"}, "lora_ga"),
        ({"init_lora_weights": "something_new"}, "something_new"),
        ({"peft_type": "ADALORA"}, "ADALORA"),
        ({"peft_type": None}, "peft_type is None"),
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"use_future_trick": True}, "use_future_trick"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_feature_that_changes_the_result_is_refused_by_name(fields: dict[str, object], named: str) -> None:
    with pytest.raises(AdapterIncompatible, match=r"adapter_config\.json: ") as caught:
        parse(**fields)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"modules_to_save": None},
        {"modules_to_save": []},
        {"use_dora": False, "lora_bias": False, "bias": "none"},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": False},
        {"fan_in_fan_out": True},
        {"lora_dropout": 0.1, "task_type": "CAUSAL_LM", "base_model_name_or_path": "x/y", "inference_mode": True},
        {"qalora_group_size": 16, "megatron_core": "megatron.core"},
        {"use_future_trick": None},
        {"use_future_trick": False},
        {"layers_to_transform": [0], "layers_pattern": "layers"},
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj"], "target_parameters": None},
    ],
    ids=str,
)
def test_fields_that_do_not_change_the_result_are_accepted(fields: dict[str, object]) -> None:
    assert parse(**fields).r == 8


@pytest.mark.parametrize(
    "fields",
    [
        {"r": 0},
        {"r": -1},
        {"r": 513},
        {"r": 10**30},
        {"r": True},
        {"r": "8"},
        {"r": 8.0},
        {"r": None},
        {"lora_alpha": float("nan")},
        {"lora_alpha": float("inf")},
        {"lora_alpha": 10**400},
        {"lora_alpha": "16"},
        {"lora_alpha": None},
        {"lora_alpha": True},
        {"use_rslora": "yes"},
        {"rank_pattern": [1]},
        {"rank_pattern": {"q_proj": 0}},
        {"rank_pattern": {"q_proj": "8"}},
        {"rank_pattern": {"(a+)+z": 8}},
        {"alpha_pattern": {"q_proj": None}},
        {"alpha_pattern": "q_proj"},
        {"target_modules": {"q_proj": 1}},
        {"target_modules": [1]},
        {"target_parameters": "experts.down_proj"},
    ],
    ids=str,
)
def test_a_value_of_the_wrong_type_or_range_is_refused_with_its_field(fields: dict[str, object]) -> None:
    with pytest.raises(AdapterIncompatible, match=next(iter(fields))):
        parse(**fields)


def test_a_rank_that_disagrees_with_the_tensors_names_both() -> None:
    with pytest.raises(AdapterIncompatible, match=r"'m'.* rank 4 .* says 8"):
        parse().numbers("m", 4)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b'{"r": 8, "r": 4, "peft_type": "LORA"}',
        b"\xff\xfe{}",
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"peft_type": "LORA", "r": 1' + b"0" * 5000 + b"}",
    ],
    ids=["empty", "open", "list", "number", "duplicate key", "not UTF-8", "deep list", "deep object", "huge number"],
)
def test_a_malformed_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_bytes(content)
    with pytest.raises(AdapterIncompatible, match=r"adapter_config\.json"):
        AdapterConfig.read(path)


def test_a_missing_file_is_refused_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(AdapterIncompatible, match=r"adapter_config\.json"):
        AdapterConfig.read(tmp_path / "adapter_config.json")


def test_a_file_is_read_as_its_object(tmp_path: Path) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(PLAIN | {"r": 24}))
    assert AdapterConfig.read(path).r == 24
