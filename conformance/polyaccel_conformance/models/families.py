"""Small random models and adapters, written as the files that users load. The same bits on every platform."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from polyaccel_conformance.words import Source

Floats32 = npt.NDArray[np.float32]
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
POSITIONS = 512
NORM_EPS = 1e-5
ROPE_THETA = 10000.0
SCALE = 0.3
"""Of what an adapter adds, beside what it adds to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Sizes of a small model. Heads and vocabulary are such that no world size above 1 divides everything.

    ``experts``: 0 for a dense feed-forward. ``qk_norm``: norms of each head of q and k. ``window``: how many
    tokens the attention of every second layer sees; None for all.
    """

    name: str
    architecture: str
    model_type: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    layers: int = 4
    experts: int = 0
    experts_per_token: int = 0
    qk_norm: bool = False
    tied: bool = False
    window: int | None = None

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Of each layer."""
        return tuple(self.window if layer % 2 else None for layer in range(self.layers))

    def config(self) -> dict[str, object]:
        """``config.json`` of a Hugging Face folder."""
        values: dict[str, object] = {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "num_hidden_layers": self.layers,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": POSITIONS,
            "rms_norm_eps": NORM_EPS,
            "rope_theta": ROPE_THETA,
            "hidden_act": "silu",
            "tie_word_embeddings": self.tied,
            "torch_dtype": "float32",
        }
        if self.experts:
            values |= {"num_local_experts": self.experts, "num_experts_per_tok": self.experts_per_token}
        if self.window is not None:
            kinds = ["full_attention" if window is None else "sliding_attention" for window in self.windows]
            values |= {"use_sliding_window": True, "sliding_window": self.window, "layer_types": kinds}
        return values

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the checkpoint."""
        q, kv, h, m = self.heads * self.head_dim, self.kv_heads * self.head_dim, self.hidden, self.intermediate
        found: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocabulary, h),
            "model.norm.weight": (h,),
        }
        if not self.tied:
            found["lm_head.weight"] = (self.vocabulary, h)
        for layer in range(self.layers):
            p = f"model.layers.{layer}"
            found |= {f"{p}.input_layernorm.weight": (h,), f"{p}.post_attention_layernorm.weight": (h,)}
            found |= {f"{p}.self_attn.{n}_proj.weight": (w, h) for n, w in (("q", q), ("k", kv), ("v", kv))}
            found[f"{p}.self_attn.o_proj.weight"] = (h, q)
            if self.qk_norm:
                found |= {f"{p}.self_attn.{n}_norm.weight": (self.head_dim,) for n in "qk"}
            if self.experts:
                moe = f"{p}.block_sparse_moe"
                found[f"{moe}.gate.weight"] = (self.experts, h)
                for e in range(self.experts):
                    found |= {f"{moe}.experts.{e}.w{i}.weight": (m, h) for i in (1, 3)}
                    found[f"{moe}.experts.{e}.w2.weight"] = (h, m)
            else:
                found |= {f"{p}.mlp.{n}_proj.weight": (m, h) for n in ("gate", "up")}
                found[f"{p}.mlp.down_proj.weight"] = (h, m)
        return found


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        family.name: family
        for family in (
            Family(
                name="llama",
                architecture="LlamaForCausalLM",
                model_type="llama",
                hidden=72,
                intermediate=100,
                heads=9,
                kv_heads=3,
                head_dim=8,
                vocabulary=203,
            ),
            Family(
                name="qwen3",
                architecture="Qwen3ForCausalLM",
                model_type="qwen3",
                hidden=64,
                intermediate=96,
                heads=8,
                kv_heads=2,
                head_dim=16,
                vocabulary=128,
                qk_norm=True,
                tied=True,
                window=20,
            ),
            Family(
                name="mixtral",
                architecture="MixtralForCausalLM",
                model_type="mixtral",
                hidden=64,
                intermediate=56,
                heads=4,
                kv_heads=2,
                head_dim=16,
                vocabulary=101,
                experts=5,
                experts_per_token=2,
            ),
        )
    }
)


def tensors(family: Family, seed: int = 0) -> dict[str, Floats32]:
    """Random weights that keep activations near 1 and spread the logits, so that few choices are close."""
    source = Source(seed)
    found: dict[str, Floats32] = {}
    for name, shape in family.shapes().items():
        drawn = source.normal(name, shape)
        if len(shape) == 1:
            values = 1 + 0.1 * drawn
        elif name == "model.embed_tokens.weight" and not family.tied:
            values = drawn
        else:
            values = (
                drawn * (2.0 if name.endswith(("lm_head.weight", "embed_tokens.weight")) else 1.0) / shape[-1] ** 0.5
            )
        found[name] = values.astype(np.float32)
    return found


def write_model(family: Family, folder: Path, seed: int = 0) -> Path:
    """A Hugging Face folder without a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(family.config()), encoding="utf-8")
    write_safetensors(folder / "model.safetensors", tensors(family, seed))
    return folder


@dataclass(frozen=True, slots=True, kw_only=True)
class SmallAdapter:
    """A PEFT adapter: ``rank``, ``alpha`` and the linear layers that it changes."""

    name: str
    rank: int
    alpha: int
    modules: tuple[str, ...]

    def on(self, family: Family) -> tuple[str, ...]:
        """Those of its layers that a family has."""
        return tuple(module for module in self.modules if not family.experts or module in LINEARS[:4])


ADAPTERS: Mapping[str, SmallAdapter] = MappingProxyType(
    {
        a.name: a
        for a in (
            SmallAdapter(name="everything", rank=8, alpha=16, modules=LINEARS),
            # A rank that no world size divides, above the width of a KV head on every rank.
            SmallAdapter(name="odd", rank=33, alpha=8, modules=("v_proj", "o_proj")),
            SmallAdapter(name="one", rank=1, alpha=8, modules=("q_proj", "k_proj")),
        )
    }
)


def adapter_tensors(adapter: SmallAdapter, family: Family, seed: int = 0) -> dict[str, tuple[Floats32, Floats32]]:
    """``A: [rank, k]`` and ``B: [n, rank]`` by module name. Deltas are about a third of the weights they change."""
    modules, source = adapter.on(family), Source(seed)
    found: dict[str, tuple[Floats32, Floats32]] = {}
    for name, shape in family.shapes().items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] not in modules:
            continue
        n, k = shape
        a = source.normal(f"{adapter.name}.{name}.a", (adapter.rank, k)) / k**0.5
        b = source.normal(f"{adapter.name}.{name}.b", (n, adapter.rank)) / adapter.rank**0.5
        found[module] = a.astype(np.float32), (SCALE * adapter.rank / adapter.alpha * b).astype(np.float32)
    return found


def write_adapter(adapter: SmallAdapter, family: Family, folder: Path, seed: int = 0) -> Path:
    """A PEFT folder."""
    found: dict[str, Floats32] = {}
    for module, (a, b) in adapter_tensors(adapter, family, seed).items():
        found |= {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b}
    return write_peft(folder, found, rank=adapter.rank, alpha=adapter.alpha, modules=adapter.on(family))


def write_peft(
    folder: Path, tensors: Mapping[str, Floats32], *, rank: int, alpha: float, modules: Sequence[str]
) -> Path:
    """A PEFT folder with these tensors, by PEFT's names."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": list(modules),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    return folder


def prompts(family: Family, lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Random prompts; the second and last begin alike, for the prefix cache."""
    source = Source(seed)
    found = [source.integers(f"prompt {i}", (n,), 0, family.vocabulary - 1).tolist() for i, n in enumerate(lengths)]
    if len(found) > 2:
        common = min(len(found[1]), len(found[-1]) - 1)
        found[-1][:common] = found[1][:common]
    return found


def write_safetensors(path: Path, values: Mapping[str, Floats32]) -> None:
    """The format of https://github.com/huggingface/safetensors: length, JSON header, data."""
    header: dict[str, object] = {}
    offset = 0
    for name, array in values.items():
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for array in values.values():
            file.write(array.astype("<f4").tobytes())
