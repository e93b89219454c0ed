"""A Llama of two layers with heads that FIA takes, random: what decodes in a second on simulated cards."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN, HEADS, KV_HEADS, HEAD, FFN, LAYERS, VOCABULARY = 128, 4, 2, 32, 192, 2, 96
SHAPES = {
    "self_attn.q_proj": (HEADS * HEAD, HIDDEN),
    "self_attn.k_proj": (KV_HEADS * HEAD, HIDDEN),
    "self_attn.v_proj": (KV_HEADS * HEAD, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * HEAD),
    "mlp.gate_proj": (FFN, HIDDEN),
    "mlp.up_proj": (FFN, HIDDEN),
    "mlp.down_proj": (HIDDEN, FFN),
}


def write(folder: Path) -> Path:
    """The folder with its config and its float16 weights."""
    generator = torch.Generator().manual_seed(7)

    def drawn(n: int, k: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(n, k, generator=generator) * scale * k**-0.5).half()

    tensors = {"model.norm.weight": torch.ones(HIDDEN).half()}
    # Wide apart, so that one id leads clearly: tokens do not depend on how products are rounded.
    tensors |= {name: drawn(VOCABULARY, HIDDEN, 8.0) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        tensors |= {f"{prefix}{module}.weight": drawn(n, k) for module, (n, k) in SHAPES.items()}
        norms = ("input_layernorm", "post_attention_layernorm")
        tensors |= {f"{prefix}{norm}.weight": torch.ones(HIDDEN).half() for norm in norms}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "torch_dtype": "float16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def write_adapter(folder: Path, rank: int, seed: int = 1) -> Path:
    """An adapter of every linear layer, strong enough to change answers."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(LAYERS):
        for module, (n, k) in SHAPES.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, k, generator=generator) * k**-0.5
            tensors[f"{name}.lora_B.weight"] = torch.randn(n, rank, generator=generator) * rank**-0.5
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = [module.rpartition(".")[2] for module in SHAPES]
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
