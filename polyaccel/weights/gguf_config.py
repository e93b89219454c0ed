"""GGUF metadata as a Hugging Face configuration. Keys: gguf.md of ggml, section "Standardized key-value pairs"."""

from __future__ import annotations

import math
from collections.abc import Container

import numpy as np

from polyaccel.backend.errors import ModelLoadError
from polyaccel.weights.gguf_file import GGUFFile
from polyaccel.weights.gguf_names import ARCHITECTURES, ROPE_FACTORS

_MODELS = {
    "llama": ("LlamaForCausalLM", "llama"),
    "mistral": ("MistralForCausalLM", "mistral"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
}
_MIXTRAL = ("MixtralForCausalLM", "mixtral")


def architecture_of(file: GGUFFile) -> str:
    """``general.architecture``. Raises ModelLoadError for unsupported ones and for files that are part of a split."""
    architecture = file.text("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ModelLoadError(
            f"{file.path}: architecture {architecture[:80]!r} is not supported; "
            f"supported are {', '.join(ARCHITECTURES)}"
        )
    if file.integer("split.count", 1) > 1:
        raise ModelLoadError(
            f"{file.path}: is one of {file.integer('split.count')} parts of a split GGUF; "
            "merge them with gguf-split --merge"
        )
    return architecture


def hf_config(file: GGUFFile, architecture: str, names: Container[str]) -> dict[str, object]:
    """The configuration that the original ``config.json`` would hold, from metadata and the tensors' ``names``.

    Only consistency that the reader itself needs is checked here; ``ModelConfig.from_hf`` checks every value.
    """
    heads = _uniform(file, f"{architecture}.attention.head_count")
    hidden = file.integer(f"{architecture}.embedding_length")
    experts = file.integer(f"{architecture}.expert_count", 0)
    model, family = _MIXTRAL if experts > 0 and architecture in ("llama", "mistral") else _MODELS[architecture]
    if experts > 0 and family != "mixtral":
        raise ModelLoadError(f"{file.path}: experts in architecture {architecture!r} are not supported")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ModelLoadError(f"{file.path}: there is no two-dimensional tensor 'token_embd.weight'")
    if heads < 1 or hidden < 1:
        raise ModelLoadError(f"{file.path}: {heads} heads and embedding length {hidden} must be positive")
    rotary = file.integer(f"{architecture}.rope.dimension_count", 0)
    head_dim = file.integer(f"{architecture}.attention.key_length", rotary or hidden // heads)
    if file.integer(f"{architecture}.attention.value_length", head_dim) != head_dim:
        raise ModelLoadError(f"{file.path}: keys and values of different length are not supported")
    bias = "model.layers.0.self_attn.q_proj.bias" in names
    config: dict[str, object] = {
        "architectures": [model],
        "model_type": family,
        "hidden_size": hidden,
        "num_hidden_layers": file.integer(f"{architecture}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _uniform(file, f"{architecture}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": _uniform(file, f"{architecture}.feed_forward_length"),
        "vocab_size": embedding.shape[0],
        "max_position_embeddings": file.integer(f"{architecture}.context_length"),
        "rms_norm_eps": _shortest(file.number(f"{architecture}.attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest(file.number(f"{architecture}.rope.freq_base", 10000.0)),
        "hidden_act": "silu",
        "tie_word_embeddings": "lm_head.weight" not in names,
        "attention_bias": bias and family != "qwen2",
        "mlp_bias": "model.layers.0.mlp.down_proj.bias" in names,
        "sliding_window": file.integer(f"{architecture}.attention.sliding_window", 0) or None,
        "dtype": _dtype(file),
    }
    if rotary and rotary != head_dim:
        config["partial_rotary_factor"] = rotary / head_dim if head_dim else 0.0
    if family == "mixtral":
        config["num_local_experts"] = experts
        config["num_experts_per_tok"] = file.integer(f"{architecture}.expert_used_count")
    if family in ("qwen2", "qwen3"):
        config["use_sliding_window"] = False
    scaling = _rope_scaling(file, architecture)
    if scaling is not None:
        config["rope_scaling"] = scaling
    if "tokenizer.ggml.bos_token_id" in file.metadata:
        config["bos_token_id"] = file.integer("tokenizer.ggml.bos_token_id")
    config["eos_token_id"] = eos_token_ids(file)
    return config


def eos_token_ids(file: GGUFFile) -> list[int]:
    """The ids that end a turn: eos, end of turn and end of message, without repeats."""
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    present = [f"tokenizer.ggml.{key}" for key in keys if f"tokenizer.ggml.{key}" in file.metadata]
    return list(dict.fromkeys(file.integer(key) for key in present))


def _uniform(file: GGUFFile, key: str, default: int | None = None) -> int:
    value = file.metadata.get(key)
    if isinstance(value, np.ndarray) and value.size and np.issubdtype(value.dtype, np.integer):
        if (value != value.flat[0]).any():
            raise ModelLoadError(f"{file.path}: {key!r} differs between layers, which is not supported")
        return int(value.flat[0])
    return file.integer(key, default)


def _shortest(value: float) -> float:
    # NOTE: metadata hold float32; 9.999999747378752e-06 was written as 1e-05 and has to compare equal to it.
    with np.errstate(over="ignore"):
        narrow = np.float32(value)
    return float(str(narrow)) if math.isfinite(value) else value


def _dtype(file: GGUFFile) -> str:
    elements = {"float16": 0, "bfloat16": 0, "float32": 0}
    for tensor in file.tensors.values():
        name = {"F16": "float16", "BF16": "bfloat16"}.get(tensor.type.name, "float32")
        elements[name] += tensor.nbytes
    return max(elements, key=lambda name: elements[name])


def _rope_scaling(file: GGUFFile, architecture: str) -> dict[str, object] | None:
    factors = file.tensors.get(ROPE_FACTORS)
    if factors is not None:
        if factors.type.name != "F32" or len(factors.shape) != 1:
            raise ModelLoadError(
                f"{file.path}: {ROPE_FACTORS!r} is {factors.type.name}{list(factors.shape)}, "
                "expected F32 in 1 dimension"
            )
        values = np.ascontiguousarray(file.raw(factors)).view("<f4").reshape(-1)
        return {"rope_type": "factors", "factors": [_shortest(float(value)) for value in values]}
    key = f"{architecture}.rope.scaling"
    kind = file.text(f"{key}.type", "linear" if f"{architecture}.rope.scale_linear" in file.metadata else "none")
    if kind == "none":
        return None
    scaling: dict[str, object] = {"rope_type": kind}
    factor = _shortest(file.number(f"{key}.factor", file.number(f"{architecture}.rope.scale_linear", 1.0)))
    scaling["factor"] = factor
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = file.integer(f"{key}.original_context_length")
        attention = file.number(f"{key}.attn_factor", 1.0)
        if attention != 1.0 and factor > 1.0:
            scaling["attention_factor"] = _shortest(attention * (0.1 * math.log(factor) + 1.0))
        for name in ("beta_fast", "beta_slow"):
            if f"{key}.yarn_{name}" in file.metadata:
                scaling[name] = _shortest(file.number(f"{key}.yarn_{name}"))
    return scaling
