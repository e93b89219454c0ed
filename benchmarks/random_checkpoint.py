"""A checkpoint of the shape of Mistral-7B and an adapter for it, of random numbers."""

from __future__ import annotations

import json
from pathlib import Path

import torch

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCABULARY = 4096, 32, 8, 128, 14336, 32000
SHAPES = {
    "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
    "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
    "mlp.gate_proj": (FFN, HIDDEN),
    "mlp.up_proj": (FFN, HIDDEN),
    "mlp.down_proj": (HIDDEN, FFN),
}


def drawn(n: int, k: int) -> torch.Tensor:
    return (torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * k**-0.5).cpu()


def write_checkpoint(folder: Path, layers: int) -> None:
    """Config and one safetensors file a layer."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    torch.manual_seed(0)
    ones = torch.ones(HIDDEN, dtype=torch.bfloat16)
    where: dict[str, str] = {}

    def write(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / name, metadata={"format": "pt"})
        where.update(dict.fromkeys(tensors, name))

    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        tensors = {f"{prefix}{module}.weight": drawn(n, k) for module, (n, k) in SHAPES.items()}
        norms = {f"{prefix}{norm}_layernorm.weight": ones.clone() for norm in ("input", "post_attention")}
        write(f"model-{layer:05}.safetensors", {**tensors, **norms})
    ends = {
        "model.embed_tokens.weight": drawn(VOCABULARY, HIDDEN),
        "lm_head.weight": drawn(VOCABULARY, HIDDEN),
        "model.norm.weight": ones,
    }
    write("model-ends.safetensors", ends)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    config = {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))


def write_adapter(folder: Path, layers: int, rank: int) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    tensors = {}
    for layer in range(layers):
        for module, (n, k) in SHAPES.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{name}.lora_A.weight"] = drawn(rank, k)
            tensors[f"{name}.lora_B.weight"] = drawn(n, rank) * 0.1
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = [module.rpartition(".")[2] for module in SHAPES]
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
