"""Norms, rotary embedding and activations in few passes. Statistics and narrower dtypes are computed in float32."""

from __future__ import annotations

import torch
from torch.nn.functional import silu

from polyaccel.backend.composite.dense import embedding as embedding_in_full
from polyaccel.backend.step import Step
from polyaccel.backend.weight import WeightSpec


def embedding(table: torch.Tensor, spec: WeightSpec, step: Step, vocabulary_start: int) -> torch.Tensor:
    """As the composite. Where all ids are this rank's and have no adapters it is one lookup."""
    if vocabulary_start == 0 and table.shape[0] and not len(step.input.rows("tokens")):
        try:
            return table.index_select(0, step.tensor("token_ids"))
        except IndexError:
            # Some id is beyond this rank's rows.
            pass
    return embedding_in_full(table, spec, step, vocabulary_start)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """``x * rsqrt(mean(x^2) + eps) * weight`` over the last dimension of ``x: [..., hidden]``, in ``out``: a new tensor
    by default, and it may be x. ``weight`` may have several rows, of x's last two dimensions.

    ``eps`` is a float32 tensor without dimensions: torch converts a Python number anew in every call.
    """
    if x.dtype == torch.float32:
        return torch.mul(x, _scale(x, eps), out=out).mul_(weight)
    wide = x.float()
    wide.mul_(_scale(wide, eps)).mul_(weight.float())
    return wide.to(x.dtype) if out is None else out.copy_(wide)


def rms_norm_(x: torch.Tensor, weight: torch.Tensor, eps: torch.Tensor) -> None:
    """:func:`rms_norm` in place."""
    rms_norm(x, weight, eps, out=x)


def _scale(wide: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    """``rsqrt(mean(x^2) + eps)`` of each row, ``[..., 1]``."""
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return torch.addcmul(eps, length, length, value=1.0 / max(1, wide.shape[-1])).rsqrt_()


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(:func:`rms_norm` of s, s) with ``s = x + residual``, a new tensor."""
    s = torch.add(x, residual)
    return rms_norm(s, weight, eps), s


def rotate_(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, style: str) -> None:
    """Rotate the first ``cos.shape[-1]`` dimensions of ``x: [T, heads, head_dim]`` in place.

    ``cos, sin: [T, 1, rotary_dim]`` float32, the partner's sign in ``sin`` (:meth:`CpuStep.rope_rows`).
    """
    width = cos.shape[-1]
    turned = x if width == x.shape[-1] else x[..., :width]
    if x.dtype == torch.float32:
        partner = _partner(turned, style)
        turned.mul_(cos).addcmul_(partner, sin)
    else:
        wide = turned.float()
        turned.copy_((wide * cos).addcmul_(_partner(wide, style), sin))


def _partner(x: torch.Tensor, style: str) -> torch.Tensor:
    """A copy with the members of each pair swapped."""
    if style == "half":
        return x.roll(x.shape[-1] // 2, -1)
    return x.view(*x.shape[:-1], x.shape[-1] // 2, 2).flip(-1).flatten(-2)


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """``silu(x[..., :n]) * x[..., n:]`` for ``x: [..., 2 n]``; a new tensor."""
    gate, up = x.chunk(2, dim=-1)
    if x.dtype == torch.float32:
        return silu(gate).mul_(up)
    return silu(gate.float()).mul_(up).to(x.dtype)
