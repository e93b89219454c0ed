"""FlagGems' functions on the CPU: the signatures of 5.0.2, and its roundings."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def rms_norm(x: torch.Tensor, normalized_shape: Sequence[int], weight: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    return _normed(x.float(), weight, eps).to(x.dtype)


def fused_add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, normalized_shape: Sequence[int], weight: torch.Tensor, eps: float = 1e-5
) -> tuple[torch.Tensor, torch.Tensor]:
    """In place; the statistics are those of the sum before it is rounded."""
    s = x.float() + residual.float()
    residual.copy_(s)
    x.copy_(_normed(s, weight, eps))
    return x, residual


def _normed(wide: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return wide * (1 / torch.sqrt(wide.square().mean(-1, keepdim=True) + eps)) * weight.float()


def layer_norm(
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    assert weight is not None
    wide = input.float()
    mean = wide.mean(-1, keepdim=True)
    rstd = torch.rsqrt((wide - mean).square().mean(-1, keepdim=True) + eps)
    y = (wide - mean) * rstd * weight.float()
    return (y if bias is None else y + bias.float()).to(input.dtype), mean.to(input.dtype), rstd.to(input.dtype)


def silu_and_mul(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    wide = A.float()
    return (wide / (1.0 + torch.exp(-wide)) * B.float()).to(A.dtype)


def gelu(self: torch.Tensor, *, approximate: str = "none") -> torch.Tensor:
    wide = self.float()
    if approximate == "tanh":
        return (0.5 * wide * (1 + torch.tanh(wide * 0.79788456 * (1 + 0.044715 * wide * wide)))).to(self.dtype)
    return (0.5 * wide * (1 + torch.erf(wide * 0.7071067811))).to(self.dtype)


def apply_rotary_pos_emb(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    rotary_interleaved: bool = False,
    inplace: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    assert position_ids is not None
    assert cos.shape[-1] * 2 == q.shape[-1]
    c, s = cos[position_ids].unsqueeze(1), sin[position_ids].unsqueeze(1)
    turned = []
    for x in (q.float(), k.float()):
        if rotary_interleaved:
            first, second = x[..., 0::2], x[..., 1::2]
            turned.append(torch.stack((first * c - second * s, second * c + first * s), -1).flatten(-2).to(q.dtype))
        else:
            first, second = x.chunk(2, -1)
            turned.append(torch.cat((first * c - second * s, second * c + first * s), -1).to(q.dtype))
    return turned[0], turned[1]


def reshape_and_cache_flash(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_cache_dtype: str,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> None:
    """``key_cache: [blocks, block_size, heads, head_size]``; a negative slot stores nothing."""
    size = key_cache.shape[1]
    kept = slot_mapping >= 0
    slots = slot_mapping[kept]
    key_cache[slots // size, slots % size] = key[kept]
    value_cache[slots // size, slots % size] = value[kept]


def topk_softmax(
    topk_weights: torch.Tensor,
    topk_indices: torch.Tensor,
    token_expert_indices: torch.Tensor,
    gating_output: torch.Tensor,
    renormalize: bool = False,
) -> None:
    assert topk_weights.shape[-1] <= 32
    shifted = torch.exp(gating_output.float() - gating_output.float().amax(-1, keepdim=True))
    scores = shifted / (shifted.sum(-1, keepdim=True) + 1e-8)
    values, ids = torch.sort(scores, dim=-1, descending=True, stable=True)
    values, ids = values[:, : topk_weights.shape[1]], ids[:, : topk_weights.shape[1]]
    if renormalize:
        values = values / (values.sum(-1, keepdim=True) + 1e-8)
    topk_weights.copy_(values)
    topk_indices.copy_(ids)
