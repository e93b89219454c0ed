"""Small checkpoint files written for tests, well-formed or broken on purpose."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

VOCABULARY, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FEED_FORWARD = 32, 64, 4, 2, 16, 96


def safetensors_bytes(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file with any header: an object to be dumped, or bytes taken as they are."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(dtype: str, shape: Sequence[object], start: object, stop: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def gguf_string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def gguf_bytes(
    keys: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    version: int = 3,
    tensor_count: int | None = None,
    key_count: int | None = None,
) -> bytes:
    """A GGUF file of raw entries, padded to the default alignment, with counts that may lie."""
    header = b"GGUF" + struct.pack(
        "<IQQ",
        version,
        len(tensors) if tensor_count is None else tensor_count,
        len(keys) if key_count is None else key_count,
    )
    body = header + b"".join(keys) + b"".join(tensors)
    return body + bytes(-len(body) % 32) + data


def gguf_key(name: str, code: int, value: bytes) -> bytes:
    return gguf_string(name) + struct.pack("<I", code) + value


def gguf_info(name: str, dims: Sequence[int], code: int, offset: int) -> bytes:
    return gguf_string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, code, offset)


def model_tensors(
    architecture: str, layers: int = 1, experts: int = 0, seed: int = 0
) -> dict[str, npt.NDArray[np.float32]]:
    """Random GGUF tensors of a tiny model, under GGUF's names."""
    random = np.random.default_rng(seed)

    def matrix(*shape: int) -> npt.NDArray[np.float32]:
        return random.standard_normal(shape, dtype=np.float32)

    tensors = {"token_embd.weight": matrix(VOCABULARY, HIDDEN), "output_norm.weight": matrix(HIDDEN)}
    for layer in range(layers):
        block = {
            "attn_norm.weight": matrix(HIDDEN),
            "ffn_norm.weight": matrix(HIDDEN),
            "attn_q.weight": matrix(HEADS * HEAD_DIM, HIDDEN),
            "attn_k.weight": matrix(KV_HEADS * HEAD_DIM, HIDDEN),
            "attn_v.weight": matrix(KV_HEADS * HEAD_DIM, HIDDEN),
            "attn_output.weight": matrix(HIDDEN, HEADS * HEAD_DIM),
        }
        if architecture == "qwen2":
            block["attn_q.bias"] = matrix(HEADS * HEAD_DIM)
            block["attn_k.bias"] = matrix(KV_HEADS * HEAD_DIM)
            block["attn_v.bias"] = matrix(KV_HEADS * HEAD_DIM)
        if architecture == "qwen3":
            block["attn_q_norm.weight"] = matrix(HEAD_DIM)
            block["attn_k_norm.weight"] = matrix(HEAD_DIM)
        if experts:
            block["ffn_gate_inp.weight"] = matrix(experts, HIDDEN)
            block["ffn_gate_exps.weight"] = matrix(experts, FEED_FORWARD, HIDDEN)
            block["ffn_up_exps.weight"] = matrix(experts, FEED_FORWARD, HIDDEN)
            block["ffn_down_exps.weight"] = matrix(experts, HIDDEN, FEED_FORWARD)
        else:
            block["ffn_gate.weight"] = matrix(FEED_FORWARD, HIDDEN)
            block["ffn_up.weight"] = matrix(FEED_FORWARD, HIDDEN)
            block["ffn_down.weight"] = matrix(HIDDEN, FEED_FORWARD)
        tensors.update({f"blk.{layer}.{name}": value for name, value in block.items()})
    return tensors


def write_gguf(
    path: Path,
    architecture: str = "llama",
    *,
    layers: int = 1,
    experts: int = 0,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    tensors: Mapping[str, npt.NDArray[np.float32]] | None = None,
    extra: Mapping[str, object] | None = None,
) -> Path:
    """A tiny model as the ``gguf`` package's own writer makes it; matrices are stored as ``kind``, vectors as F32."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(2)
    for key, value in (extra or {}).items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, tensor in (model_tensors(architecture, layers, experts) if tensors is None else tensors).items():
        if tensor.ndim > 1 and kind is not gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, gguf.quantize(tensor, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
