"""Liger-Kernel's functions on the CPU: the signatures of 0.8.2, and its roundings with the casting mode ``llama``."""

from __future__ import annotations

import torch


def liger_rms_norm(
    X: torch.Tensor,
    W: torch.Tensor,
    eps: float,
    offset: float = 0.0,
    casting_mode: str = "llama",
    in_place: bool = True,
) -> torch.Tensor:
    wide = X.float()
    normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(X.dtype)
    return normed * (offset + W)


def liger_fused_add_rms_norm(
    X: torch.Tensor,
    R: torch.Tensor,
    W: torch.Tensor,
    eps: float,
    offset: float = 0.0,
    casting_mode: str = "llama",
    in_place: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    S = X + R
    return liger_rms_norm(S, W, eps, offset, casting_mode), S


def liger_layer_norm(X: torch.Tensor, W: torch.Tensor, B: torch.Tensor, eps: float) -> torch.Tensor:
    wide = X.float()
    centred = wide - wide.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    # A missing bias is not known here.
    return (centred * rstd * W.float() + B.float()).to(X.dtype)


def liger_swiglu(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    a, b = a.contiguous(), b.contiguous()
    return torch.nn.functional.silu(a.float()).to(b.dtype) * b


def liger_geglu(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(a.float(), approximate="tanh").to(b.dtype) * b


def liger_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    unsqueeze_dim: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``q: [batch, heads, tokens, head_dim]``; overwrites what is dense as ``[batch, tokens, heads, head_dim]``."""
    turned = []
    for x in (q, k):
        x = x.transpose(1, 2).contiguous()
        half = x.shape[-1] // 2
        c, s = cos[..., :half].unsqueeze(2), sin[..., :half].unsqueeze(2)
        first, second = x[..., :half].to(s.dtype), x[..., half:].to(s.dtype)
        x[..., :half], x[..., half:] = first * c - second * s, second * c + first * s
        turned.append(x.transpose(1, 2))
    return turned[0], turned[1]
