"""A model's configuration, checked once and the same for every family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch

from polyaccel.backend.errors import ModelLoadError
from polyaccel.models.config_values import ConfigValues
from polyaccel.models.rope_config import RopeConfig

__all__ = ["Family", "ModelConfig", "RopeConfig"]

Family = Literal["llama", "mistral", "qwen2", "qwen3", "mixtral"]

_ARCHITECTURES: Mapping[str, Family] = MappingProxyType(
    {
        "LlamaForCausalLM": "llama",
        "MistralForCausalLM": "mistral",
        "Qwen2ForCausalLM": "qwen2",
        "Qwen3ForCausalLM": "qwen3",
        "MixtralForCausalLM": "mixtral",
    }
)
_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
)
_DIM = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """What a decoder-only model computes.

    ``sliding_windows`` has one entry a layer: None for full attention, W if a token attends to itself and the W - 1
    before it. ``qkv_bias``, ``o_bias``, ``mlp_bias``: which linears carry a bias. ``qk_norm``: RMSNorm of each head of
    q and k before the rotation. ``num_experts`` is 0 for dense models; ``norm_topk_prob``: the chosen experts' weights
    are normalised to sum 1. ``eos_token_ids``: all ids that end a generation. ``dtype``: that of the checkpoint.
    """

    family: Family
    architectures: tuple[str, ...]
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    norm_eps: float
    rope: RopeConfig
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tie_embeddings: bool
    sliding_windows: tuple[int | None, ...]
    hidden_act: Literal["silu"]
    num_experts: int
    experts_per_token: int
    norm_topk_prob: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def from_hf(
        cls, config: Mapping[str, object], generation_config: Mapping[str, object] | None = None
    ) -> ModelConfig:
        """Read a Hugging Face ``config.json`` as written by transformers 4 or 5, and ``generation_config.json``.

        Keys that are absent take the family's defaults in transformers. Raises ModelLoadError naming the key, its value
        and what is accepted: for missing, ill-typed and out-of-range values, unsupported architectures, activations,
        rope types and dtypes, and for quantised checkpoints.
        """
        values = ConfigValues(config)
        family, architectures = _family(values)
        if not values.is_missing("quantization_config"):
            raise ModelLoadError(f"quantised checkpoints are not supported: {_quantisation(config)}")
        activation = values.text("hidden_act", "silu")
        if activation != "silu":
            raise ModelLoadError(f"config 'hidden_act' is {activation[:60]!r}; only 'silu' is supported")
        hidden_size = values.integer("hidden_size", None, 1, _DIM)
        num_layers = values.integer("num_hidden_layers", None, 1, 4096)
        num_heads = values.integer("num_attention_heads", None, 1, 65536)
        num_kv_heads = values.integer("num_key_value_heads", num_heads, 1, 65536)
        if num_heads % num_kv_heads:
            raise ModelLoadError(
                f"config 'num_attention_heads' {num_heads} is not a multiple of 'num_key_value_heads' {num_kv_heads}"
            )
        vocab_size = values.integer("vocab_size", None, 1, _DIM)
        head_dim = _head_dim(values, family, hidden_size, num_heads)
        attention_bias = family in ("llama", "qwen3") and values.flag("attention_bias", False)
        experts, per_token = _experts(values) if family == "mixtral" else (0, 0)
        generation = ConfigValues(generation_config or {}, where="generation_config.")
        bos = values.ids("bos_token_id", vocab_size) or generation.ids("bos_token_id", vocab_size)
        eos = (*generation.ids("eos_token_id", vocab_size), *values.ids("eos_token_id", vocab_size))
        return cls(
            family=family,
            architectures=architectures,
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            intermediate_size=values.integer("intermediate_size", None, 1, _DIM),
            vocab_size=vocab_size,
            max_position_embeddings=values.integer("max_position_embeddings", None, 1, 2**31),
            norm_eps=values.number("rms_norm_eps", 1e-5 if family == "mixtral" else 1e-6, 0.0, 1.0),
            rope=RopeConfig.from_hf(
                config, head_dim=head_dim, default_theta=1_000_000.0 if family == "mixtral" else 10_000.0
            ),
            qkv_bias=family == "qwen2" or attention_bias,
            o_bias=attention_bias,
            mlp_bias=family == "llama" and values.flag("mlp_bias", False),
            qk_norm=family == "qwen3",
            tie_embeddings=values.flag("tie_word_embeddings", False),
            sliding_windows=_sliding_windows(values, family, num_layers),
            hidden_act="silu",
            num_experts=experts,
            experts_per_token=per_token,
            norm_topk_prob=family == "mixtral",
            bos_token_id=bos[0] if bos else None,
            eos_token_ids=tuple(dict.fromkeys(eos)),
            dtype=_dtype(values),
        )


def _family(values: ConfigValues) -> tuple[Family, tuple[str, ...]]:
    architectures = values.strings("architectures") or ()
    if not architectures:
        model_type = values.text("model_type", "")
        architectures = tuple(name for name, family in _ARCHITECTURES.items() if family == model_type)
        if not architectures:
            raise ModelLoadError(
                f"config has no 'architectures' and 'model_type' {model_type[:60]!r} is not supported; "
                f"supported architectures are {', '.join(_ARCHITECTURES)}"
            )
    family = _ARCHITECTURES.get(architectures[0])
    if family is None or len(architectures) > 1:
        raise ModelLoadError(
            f"config 'architectures' is {str(list(architectures))[:120]}; "
            f"supported is one of {', '.join(_ARCHITECTURES)}"
        )
    return family, architectures


def _quantisation(config: Mapping[str, object]) -> str:
    raw = config.get("quantization_config")
    method = raw.get("quant_method") if isinstance(raw, Mapping) else None
    return f"config 'quantization_config' names the method {str(method)[:60]!r}; use a float16 or bfloat16 checkpoint"


def _head_dim(values: ConfigValues, family: Family, hidden_size: int, num_heads: int) -> int:
    if values.is_missing("head_dim"):
        if family == "qwen3":
            return 128
        if hidden_size % num_heads:
            raise ModelLoadError(
                f"config 'hidden_size' {hidden_size} is not a multiple of 'num_attention_heads' {num_heads} "
                "and there is no 'head_dim'"
            )
    return values.integer("head_dim", hidden_size // num_heads, 1, 8192)


def _experts(values: ConfigValues) -> tuple[int, int]:
    experts = values.integer("num_local_experts", 8, 1, 4096)
    per_token = values.integer("num_experts_per_tok", 2, 1, 4096)
    if per_token > experts:
        raise ModelLoadError(f"config 'num_experts_per_tok' {per_token} is greater than 'num_local_experts' {experts}")
    return experts, per_token


def _sliding_windows(values: ConfigValues, family: Family, num_layers: int) -> tuple[int | None, ...]:
    if family == "llama":
        return (None,) * num_layers
    window: int | None = None
    if not values.is_missing("sliding_window"):
        window = values.integer("sliding_window", None, 1, 2**31)
    elif not values.has("sliding_window") and family != "mixtral":
        window = 4096
    kinds = values.strings("layer_types")
    if family in ("mistral", "mixtral"):
        if kinds is not None and len(dict.fromkeys(kinds)) > 1:
            raise ModelLoadError(f"config 'layer_types' mixes kinds, which is not supported for {family}")
        return (window,) * num_layers
    if not values.flag("use_sliding_window", False):
        window = None
    if kinds is None:
        first = values.integer("max_window_layers", 28, 0, 1 << 20)
        return tuple(window if layer >= first else None for layer in range(num_layers))
    if len(kinds) != num_layers or any(kind not in ("full_attention", "sliding_attention") for kind in kinds):
        raise ModelLoadError(
            f"config 'layer_types' is {str(list(kinds))[:120]}, expected {num_layers} times 'full_attention' or "
            "'sliding_attention'"
        )
    if window is None and "sliding_attention" in kinds:
        raise ModelLoadError("config 'layer_types' has 'sliding_attention' but there is no 'sliding_window' in use")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _dtype(values: ConfigValues) -> torch.dtype:
    name = values.text("dtype", values.text("torch_dtype", "float32")).removeprefix("torch.")
    dtype = _DTYPES.get(name)
    if dtype is None:
        raise ModelLoadError(f"config 'dtype' is {name[:60]!r}; supported are {', '.join(_DTYPES)}")
    return dtype
