"""vLLM's custom operators on the CPU: signatures and roundings of the CUDA kernels, registered under their names."""

from __future__ import annotations

import torch

_LIBRARY = torch.library.Library("_C", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("silu_and_mul(Tensor! out, Tensor input) -> ()")  # type: ignore[no-untyped-call]
_LIBRARY.define("gelu_new(Tensor! out, Tensor input) -> ()")  # type: ignore[no-untyped-call]


def _silu_and_mul(out: torch.Tensor, input: torch.Tensor) -> None:
    gate, up = input.chunk(2, -1)
    out.copy_(torch.nn.functional.silu(gate.float()).to(out.dtype) * up)


def _gelu_new(out: torch.Tensor, input: torch.Tensor) -> None:
    cube = (input * input * input).float()
    inner = (input + (0.044715 * cube).to(out.dtype)).float()
    t = torch.tanh((0.79788456 * inner).to(out.dtype).float()).to(out.dtype)
    out.copy_(0.5 * input * (1.0 + t))


_LIBRARY.impl("silu_and_mul", _silu_and_mul, "CPU")  # type: ignore[no-untyped-call]
_LIBRARY.impl("gelu_new", _gelu_new, "CPU")  # type: ignore[no-untyped-call]


def rms_norm(out: torch.Tensor, input: torch.Tensor, weight: torch.Tensor | None, epsilon: float) -> None:
    assert out.is_contiguous()
    assert input.stride(-1) == 1
    assert weight is not None
    wide = input.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    out.copy_((wide * scale).to(out.dtype) * weight)


def fused_add_rms_norm(
    input: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, epsilon: float
) -> None:
    residual.add_(input)
    rms_norm(input, residual, weight, epsilon)


def rotary_embedding(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor | None,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool,
    rope_dim_offset: int = 0,
    inverse: bool = False,
) -> None:
    rotary = cos_sin_cache.shape[1]
    c, s = (part.unsqueeze(1) for part in cos_sin_cache[positions].chunk(2, -1))
    assert key is not None
    assert query.shape[1] % key.shape[1] == 0
    for x in (query, key):
        part = x[..., :rotary]
        first, second = part.float().chunk(2, -1) if is_neox else (part[..., 0::2].float(), part[..., 1::2].float())
        turned = (first * c - second * s, second * c + first * s)
        part.copy_(torch.cat(turned, -1) if is_neox else torch.stack(turned, -1).flatten(-2))


def reshape_and_cache_flash(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_cache_dtype: str,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
) -> None:
    size = key_cache.shape[1]
    for token, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            key_cache[slot // size, slot % size] = key[token]
            value_cache[slot // size, slot % size] = value[token]


def topk_softmax(
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    token_expert_indices: torch.Tensor,
    gating_output: torch.Tensor,
    renormalize: bool = False,
) -> None:
    values, ids = torch.sort(torch.softmax(gating_output, -1), dim=-1, descending=True, stable=True)
    values, ids = values[:, : topk_weights.shape[1]], ids[:, : topk_weights.shape[1]]
    topk_weights.copy_(values / values.sum(-1, keepdim=True) if renormalize else values)
    topk_ids.copy_(ids)
