"""Embedding, norms, rotary embedding and activations. Computed in float32, rounded once to the output's dtype."""

from __future__ import annotations

import math
from typing import Literal

import torch

from polyaccel.backend.composite.lora import adapter_store, segments
from polyaccel.backend.rope import RopeTable
from polyaccel.backend.step import Step
from polyaccel.backend.weight import WeightSpec


def embedding(table: torch.Tensor, spec: WeightSpec, step: Step, vocabulary_start: int) -> torch.Tensor:
    """Rows of ``table: [vocabulary rows of this rank, hidden]`` plus adapters; ids of other ranks give zeros."""
    local = step.tensor("token_ids") - vocabulary_start
    rows = table.shape[0]
    if rows == 0:
        return table.new_zeros((local.shape[0], table.shape[1]))
    inside = ((local >= 0) & (local < rows)).unsqueeze(-1)
    local = local.clamp(0, rows - 1)
    x = torch.where(inside, table.index_select(0, local), 0.0)
    if len(step.input.rows("tokens")) == 0:
        return x
    store, total, touched = adapter_store("embedding", step), x.float(), False
    for segment in segments(step, "tokens"):
        matrices = store.read(spec.site, 0, segment.slot)
        if matrices is None:
            continue
        columns = matrices.a.index_select(1, segment.take(local)).T.float()
        h = segment.weigh(torch.where(segment.take(inside), columns, 0.0))
        segment.add(total, h @ matrices.b.float().T)
        touched = True
    return total.to(table.dtype) if touched else x


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """``s * rsqrt(mean(s^2) + eps) * weight`` with ``s = x + residual``; with a residual, (normed, s)."""
    s = x if residual is None else (x.float() + residual.float()).to(x.dtype)
    wide = s.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    normed = (wide * scale * weight.float()).to(x.dtype)
    return normed if residual is None else (normed, s)


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """``(x - mean) * rsqrt(var + eps) * weight + bias``; the variance from the centred values."""
    wide = x.float()
    centred = wide - wide.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * weight.float()
    return (y if bias is None else y + bias.float()).to(x.dtype)


def rotary_embedding(
    q: torch.Tensor, k: torch.Tensor, rope: RopeTable, step: Step
) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k with their first ``rotary_dim`` dimensions rotated by the token's position (arXiv 2104.09864)."""
    positions = step.tensor("positions")
    cos = rope.cos.index_select(0, positions).unsqueeze(1)
    sin = rope.sin.index_select(0, positions).unsqueeze(1)
    return _rotate(q, cos, sin, rope), _rotate(k, cos, sin, rope)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rope: RopeTable) -> torch.Tensor:
    turned = x[..., : rope.rotary_dim].float()
    if rope.style == "half":
        first, second = turned.chunk(2, dim=-1)
        rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    else:
        first, second = turned[..., 0::2], turned[..., 1::2]
        rotated = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)
    rotated = rotated.to(x.dtype)
    if rope.rotary_dim == x.shape[-1]:
        return rotated
    return torch.cat((rotated, x[..., rope.rotary_dim :]), dim=-1)


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """``silu(x[..., :n]) * x[..., n:]`` for ``x: [..., 2 n]``."""
    gate, up = x.float().chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(x.dtype)


def gelu(x: torch.Tensor, approximate: Literal["none", "tanh"] = "none") -> torch.Tensor:
    """GELU, exact or by tanh (arXiv 1606.08415)."""
    wide = x.float()
    if approximate == "tanh":
        return torch.nn.functional.gelu(wide, approximate="tanh").to(x.dtype)
    # torch's own kernel for the CPU takes a coarser erf than the contract allows, and makes NaN of infinity.
    return (0.5 * wide * (1 + torch.erf(wide * math.sqrt(0.5)))).to(x.dtype)


def select_rows(x: torch.Tensor, step: Step) -> torch.Tensor:
    """``x[logits_rows]``; x itself where every token's logits are needed."""
    # The rows ascend, so as many rows as tokens are all tokens in order.
    if len(step.input.logits_rows) == x.shape[0]:
        return x
    return x.index_select(0, step.tensor("logits_rows"))
