"""A random Llama without a tokenizer, and adapters of it, as folders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

LAYERS, VOCABULARY = 3, 64


def write(home: Path, hidden: int, ranks: Sequence[int], dtype: str = "float32", head_dim: int = 32) -> Path:
    """``home/model``, and an adapter ``home/r<rank>`` of each rank on every linear layer."""
    from safetensors.torch import save_file

    heads, kv_heads, ffn = hidden // head_dim, hidden // head_dim // 2, 2 * hidden
    linears = {
        "self_attn.q_proj": (heads * head_dim, hidden),
        "self_attn.k_proj": (kv_heads * head_dim, hidden),
        "self_attn.v_proj": (kv_heads * head_dim, hidden),
        "self_attn.o_proj": (hidden, heads * head_dim),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    generator = torch.Generator().manual_seed(5)

    def drawn(n: int, k: int) -> torch.Tensor:
        return torch.randn(n, k, generator=generator).mul(k**-0.5)

    tensors = {"model.norm.weight": torch.ones(hidden)}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = drawn(VOCABULARY, hidden)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        tensors |= {f"{prefix}{module}.weight": drawn(n, k) for module, (n, k) in linears.items()}
        tensors |= {f"{prefix}{norm}_layernorm.weight": torch.ones(hidden) for norm in ("input", "post_attention")}
    (home / "model").mkdir()
    save_file(tensors, home / "model" / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "torch_dtype": dtype,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (home / "model" / "config.json").write_text(json.dumps(config))
    for rank in ranks:
        parts = {}
        for layer in range(LAYERS):
            for module, (n, k) in linears.items():
                name = f"base_model.model.model.layers.{layer}.{module}"
                parts[f"{name}.lora_A.weight"] = drawn(rank, k)
                parts[f"{name}.lora_B.weight"] = drawn(n, rank)
        (home / f"r{rank}").mkdir()
        save_file(parts, home / f"r{rank}" / "adapter_model.safetensors")
        modules = [module.rpartition(".")[2] for module in linears]
        adapter = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": modules, "bias": "none"}
        (home / f"r{rank}" / "adapter_config.json").write_text(json.dumps(adapter))
    return home
