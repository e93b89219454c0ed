"""GGUF tensor names and layouts in terms of the Hugging Face names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np
import numpy.typing as npt

from polyaccel.backend.errors import ModelLoadError
from polyaccel.weights.gguf_file import GGUFTensor

# The converter stores Q and K of these architectures with rotary pairs adjacent; all others keep Hugging Face's order.
PERMUTED_ARCHITECTURES = ("llama", "mistral")
ARCHITECTURES = (*PERMUTED_ARCHITECTURES, "qwen2", "qwen3")
ROPE_FACTORS = "rope_freqs.weight"
_MAX_EXPERTS = 4096

_GLOBAL: Mapping[str, str] = MappingProxyType(
    {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
)
_LAYER: Mapping[str, str] = MappingProxyType(
    {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "ffn_gate_inp": "block_sparse_moe.gate",
    }
)
_EXPERT: Mapping[str, str] = MappingProxyType({"ffn_gate": "w1", "ffn_down": "w2", "ffn_up": "w3"})
_BLOCK = re.compile(r"blk\.(0|[1-9][0-9]{0,4})\.([a-z_]+)(?:\.(0|[1-9][0-9]{0,4}))?\.(weight|bias)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a Hugging Face tensor comes from: a stored tensor, or one expert of it, perhaps with permuted rows."""

    tensor: GGUFTensor
    shape: tuple[int, ...]
    first_row: int = 0
    permuted: Literal["q", "k"] | None = None


def translate(tensors: Iterable[GGUFTensor], architecture: str, what: str) -> dict[str, Source]:
    """Map Hugging Face names to their sources, experts stacked in one tensor becoming one name each.

    ``what`` names the file in messages. Raises ModelLoadError for a tensor that no supported model has.
    """
    sources: dict[str, Source] = {}
    for tensor in tensors:
        if tensor.name == ROPE_FACTORS:
            continue
        for name, source in _sources_of(tensor, architecture, what):
            if name in sources:
                raise ModelLoadError(f"{what}: {sources[name].tensor.name!r} and {tensor.name!r} are both {name}")
            sources[name] = source
    return sources


def half_split_rows(start: int, stop: int, head_dim: int) -> npt.NDArray[np.int64]:
    """Stored row of each of the Hugging Face rows start..stop of a permuted Q or K.

    Within a head, row ``half * head_dim / 2 + pair`` (halves apart) is stored at ``2 * pair + half`` (pairs adjacent).
    """
    rows = np.arange(start, stop, dtype=np.int64)
    head, inside = np.divmod(rows, head_dim)
    half, pair = np.divmod(inside, head_dim // 2)
    stored: npt.NDArray[np.int64] = head * head_dim + 2 * pair + half
    return stored


def _sources_of(tensor: GGUFTensor, architecture: str, what: str) -> list[tuple[str, Source]]:
    if tensor.name in _GLOBAL:
        return [(_GLOBAL[tensor.name], _whole(tensor, what))]
    match = _BLOCK.fullmatch(tensor.name)
    if match is None:
        raise _unknown(tensor, architecture, what)
    layer, part, expert, kind = match.groups()
    prefix = f"model.layers.{layer}."
    if expert is not None:
        if part not in _EXPERT or kind != "weight":
            raise _unknown(tensor, architecture, what)
        return [(f"{prefix}block_sparse_moe.experts.{expert}.{_EXPERT[part]}.weight", _whole(tensor, what))]
    stacked = part.removesuffix("_exps")
    if stacked != part and stacked in _EXPERT and kind == "weight":
        if len(tensor.shape) != 3 or tensor.shape[0] > _MAX_EXPERTS:
            raise ModelLoadError(
                f"{what}: tensor {tensor.name!r} has shape {list(tensor.shape)}, expected experts x out x in"
            )
        experts, out, width = tensor.shape
        name = f"{prefix}block_sparse_moe.experts.{{}}.{_EXPERT[stacked]}.weight"
        return [
            (name.format(index), Source(tensor=tensor, shape=(out, width), first_row=index * out))
            for index in range(experts)
        ]
    if part not in _LAYER:
        raise _unknown(tensor, architecture, what)
    permuted: Literal["q", "k"] | None = None
    if architecture in PERMUTED_ARCHITECTURES and part in ("attn_q", "attn_k"):
        permuted = "q" if part == "attn_q" else "k"
    return [(f"{prefix}{_LAYER[part]}.{kind}", _whole(tensor, what, permuted))]


def _whole(tensor: GGUFTensor, what: str, permuted: Literal["q", "k"] | None = None) -> Source:
    if len(tensor.shape) > 2:
        raise ModelLoadError(f"{what}: tensor {tensor.name!r} has shape {list(tensor.shape)}, expected 1 or 2")
    return Source(tensor=tensor, shape=tensor.shape, permuted=permuted)


def _unknown(tensor: GGUFTensor, architecture: str, what: str) -> ModelLoadError:
    return ModelLoadError(
        f"{what}: tensor {tensor.name!r} belongs to no supported model of architecture {architecture!r} "
        f"({', '.join(ARCHITECTURES)} are supported)"
    )
