"""Adapter folders and model geometries that several tests need."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from polyaccel.lora.target import AdapterTarget
from polyaccel.parallel.cut import Rows, even_cut, head_cut, vocabulary_cut

PREFIX = "base_model.model."
HIDDEN, INTERMEDIATE, VOCABULARY, HEADS, KV_HEADS, HEAD_DIM = 72, 100, 50, 9, 3, 8
COLUMN = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
ROW = ("o_proj", "down_proj")
SIZES = {
    "q_proj": (HEADS * HEAD_DIM, HIDDEN),
    "k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "o_proj": (HIDDEN, HEADS * HEAD_DIM),
    "gate_proj": (INTERMEDIATE, HIDDEN),
    "up_proj": (INTERMEDIATE, HIDDEN),
    "down_proj": (HIDDEN, INTERMEDIATE),
}
SITES = {
    "q_proj": ("qkv", 0),
    "k_proj": ("qkv", 1),
    "v_proj": ("qkv", 2),
    "o_proj": ("o", 0),
    "gate_proj": ("gate_up", 0),
    "up_proj": ("gate_up", 1),
    "down_proj": ("down", 0),
}


def module_name(layer: int, leaf: str) -> str:
    parent = "self_attn" if leaf in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
    return f"model.layers.{layer}.{parent}.{leaf}"


def llama_targets(world: int = 1, rank: int = 0, layers: int = 2) -> list[AdapterTarget]:
    """The targets of a small Llama with 9 query and 3 KV heads, as one rank sees them."""
    heads = head_cut(HEADS, KV_HEADS, world, rank)
    inter = even_cut(INTERMEDIATE, world, rank)
    held = {
        "q_proj": heads.q_rows(HEAD_DIM),
        "k_proj": heads.kv_rows(HEAD_DIM),
        "v_proj": heads.kv_rows(HEAD_DIM),
        "o_proj": heads.q_rows(HEAD_DIM),
        "gate_proj": inter,
        "up_proj": inter,
        "down_proj": inter,
    }
    vocabulary, _ = vocabulary_cut(VOCABULARY, world, rank)
    targets = [
        AdapterTarget(
            module="model.embed_tokens",
            site="embed",
            slice=0,
            kind="embedding",
            in_features=VOCABULARY,
            out_features=HIDDEN,
            out_rows=Rows.whole(HIDDEN),
            in_cols=vocabulary,
        )
    ]
    for layer in range(layers):
        for leaf, (out_features, in_features) in SIZES.items():
            site, index = SITES[leaf]
            targets.append(
                AdapterTarget(
                    module=module_name(layer, leaf),
                    site=f"layers.{layer}.{site}",
                    slice=index,
                    in_features=in_features,
                    out_features=out_features,
                    out_rows=Rows.whole(out_features) if leaf in ROW else held[leaf],
                    in_cols=held[leaf] if leaf in ROW else Rows.whole(in_features),
                    layer=layer,
                )
            )
    targets.append(
        AdapterTarget(
            module="lm_head",
            site="lm_head",
            slice=0,
            in_features=HIDDEN,
            out_features=VOCABULARY,
            out_rows=vocabulary,
            in_cols=Rows.whole(HIDDEN),
        )
    )
    return targets


def random_matrices(
    rank: int, *, seed: int, integers: bool = False, layers: int = 1, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Tensors of an adapter on every linear of ``layers`` layers, on the embedding and on lm_head, PEFT's names."""
    generator = torch.Generator().manual_seed(seed)

    def draw(rows: int, cols: int) -> torch.Tensor:
        if integers:
            return torch.randint(-3, 4, (rows, cols), generator=generator).to(dtype)
        return torch.randn(rows, cols, generator=generator).to(dtype)

    tensors: dict[str, torch.Tensor] = {}
    for layer in range(layers):
        for leaf, (out_features, in_features) in SIZES.items():
            stem = PREFIX + module_name(layer, leaf)
            tensors[f"{stem}.lora_A.weight"] = draw(rank, in_features)
            tensors[f"{stem}.lora_B.weight"] = draw(out_features, rank)
    tensors[f"{PREFIX}model.embed_tokens.lora_embedding_A"] = draw(rank, VOCABULARY)
    tensors[f"{PREFIX}model.embed_tokens.lora_embedding_B"] = draw(HIDDEN, rank)
    tensors[f"{PREFIX}lm_head.lora_A.weight"] = draw(rank, HIDDEN)
    tensors[f"{PREFIX}lm_head.lora_B.weight"] = draw(VOCABULARY, rank)
    return tensors


def write_folder(folder: Path, tensors: Mapping[str, torch.Tensor], **config: object) -> Path:
    """A PEFT folder with these tensors; ``config`` overrides fields of a plain rank-8 configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    fields: dict[str, object] = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "bias": "none", "use_dora": False}
    (folder / "adapter_config.json").write_text(json.dumps(fields | config))
    save_file(dict(tensors), folder / "adapter_model.safetensors")
    return folder
