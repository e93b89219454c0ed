"""An adapter on one module of a model, cut by the engine's own code for one rank."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from polyaccel.backend import Backend, Device, PackedAdapter, Weight
from polyaccel_conformance.models.families import write_safetensors

Floats = npt.NDArray[np.float64]
Ranges = tuple[tuple[int, int], ...]

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM = 72, 100, 9, 3, 8
"""Head counts as SmolLM2's: no world size but 3 cuts them evenly, and four ranks share a KV head."""
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 16,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 16,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
FEATURES = {
    "q_proj": (HEADS * HEAD_DIM, HIDDEN),
    "k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "o_proj": (HIDDEN, HEADS * HEAD_DIM),
    "gate_proj": (INTERMEDIATE, HIDDEN),
    "up_proj": (INTERMEDIATE, HIDDEN),
    "down_proj": (HIDDEN, INTERMEDIATE),
}
"""Output and input features of each module."""
ROW_PARALLEL = frozenset({"o_proj", "down_proj"})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ModuleCut:
    """One rank's part.

    Attributes:
        site, weight: where the delta is added: the model's own weight there, all zeros.
        packed: this rank's share of the adapter; None where it holds nothing of the module.
        columns: input features of this rank, in the order of its x; ``width`` of x, padding included.
        begin: first column of y that is the module's; ``rows``: output features that follow there.
    """

    site: str
    weight: Weight
    packed: PackedAdapter | None
    columns: Ranges
    width: int
    begin: int
    rows: Ranges


def write_adapter(folder: Path, module: str, a: Floats, b: Floats, alpha: float) -> Path:
    """A PEFT folder with one module: ``a: [rank, in]``, ``b: [out, rank]``, in float32."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "r": a.shape[0], "lora_alpha": alpha, "bias": "none", "target_modules": [module]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    stem = f"base_model.model.{_name(module)}"
    tensors = {f"{stem}.lora_A.weight": a.astype(np.float32), f"{stem}.lora_B.weight": b.astype(np.float32)}
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    return folder


def cut_module(
    backend: Backend,
    device: Device,
    folder: Path,
    module: str,
    *,
    dtype: torch.dtype,
    rank: int,
    world_size: int,
    rank_rows: int,
) -> ModuleCut:
    """Build the rank's part of the model, match the adapter with it and pack it, as the engine does at a load.

    Raises:
        AdapterError: the engine refuses the adapter.
    """
    from polyaccel.lora.adapter_file import AdapterFile
    from polyaccel.lora.match import match_adapter
    from polyaccel.lora.pack import pack_adapter
    from polyaccel.models.config import ModelConfig
    from polyaccel.models.model import ModelOptions
    from polyaccel.models.registry import build_model

    model = build_model(
        ModelOptions(
            config=ModelConfig.from_hf(CONFIG),
            backend=backend,
            devices=(device,),
            rank=rank,
            world_size=world_size,
            dtype=dtype,
            rank_rows=rank_rows,
            max_positions=16,
        )
    )
    targets = model.targets()
    (target,) = [target for target in targets if target.module == _name(module)]
    matched = match_adapter(AdapterFile.open(folder), targets)
    packed = pack_adapter(matched.pairs, dtype=dtype) if target.is_local else None
    weight = model.weights()[target.site]
    for index, part in enumerate(weight.spec.slices):
        weight.write(index, torch.zeros(part.n, weight.spec.k, dtype=dtype))
    weight.seal()
    return ModuleCut(
        site=target.site,
        weight=weight,
        packed=packed,
        columns=target.in_cols.ranges,
        width=weight.spec.k,
        begin=weight.spec.starts[target.slice],
        rows=target.out_rows.ranges,
    )


def _name(module: str) -> str:
    parent = "self_attn" if module in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
    return f"model.layers.0.{parent}.{module}"
