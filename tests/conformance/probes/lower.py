"""Operators in plain torch that keep fewer bits somewhere: of a sum, of operands, of an intermediate result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch

from polyaccel.backend import SampleOutput, Step, TableBackend, Weight
from polyaccel.backend.composite.lora import adapter_store, segments
from polyaccel.backend.composite.weight import TensorWeight

Function = Callable[..., Any]

F32 = torch.float32


def product(a: torch.Tensor, b: torch.Tensor, to: torch.dtype = F32) -> torch.Tensor:
    """``a @ b`` of ``[m, k]`` and ``[k, n]``, one product after the other, accumulated in ``to``; float32."""
    a, b = a.float(), b.float()
    if to is F32:
        return a @ b
    total = torch.zeros(a.shape[0], b.shape[1])
    for i in range(a.shape[1]):
        total = (total + a[:, i, None] * b[i]).to(to).float()
    return total


def summed(x: torch.Tensor, to: torch.dtype) -> torch.Tensor:
    """Over the last dimension, by halves, every partial sum in ``to``; float32."""
    parts = x.to(to)
    while parts.shape[-1] > 1:
        if parts.shape[-1] % 2:
            parts = torch.nn.functional.pad(parts, (0, 1))
        parts = parts[..., 0::2] + parts[..., 1::2]
    return parts.float()


def linear(to: torch.dtype = F32, inputs: torch.dtype | None = None) -> Function:
    def wrong(x: torch.Tensor, weight: Weight) -> torch.Tensor:
        assert isinstance(weight, TensorWeight)
        read = x if inputs is None else x.to(inputs)
        y = product(read, weight.tensor.T, to)
        return (y if weight.bias is None else y + weight.bias.float()).to(x.dtype)

    return wrong


def sgmv(shrink: torch.dtype = F32, expand: torch.dtype = F32, h_in: torch.dtype = F32) -> Function:
    def wrong(y: torch.Tensor, x: torch.Tensor, weight: Weight, step: Step, row_set: Any = "tokens") -> torch.Tensor:
        for segment in segments(step, row_set):
            for i, begin in enumerate(weight.spec.starts[: len(weight.spec.slices)]):
                found = adapter_store("sgmv", step).read(weight.spec.site, i, segment.slot)
                if found is None:
                    continue
                h = segment.weigh(product(segment.take(x), found.a.T, shrink).to(h_in).float())
                columns = slice(begin, begin + found.b.shape[0])
                y[segment.rows, columns] = (y[segment.rows, columns] + product(h, found.b.T, expand)).to(y.dtype)
        return y

    return wrong


def sgmv_shrink(to: torch.dtype) -> Function:
    def wrong(x: torch.Tensor, weight: Weight, step: Step, row_set: Any = "tokens") -> torch.Tensor:
        right = TableBackend("cpu", {}).composites()["sgmv_shrink"](x, weight, step, row_set)
        assert isinstance(right, torch.Tensor)
        for segment in segments(step, row_set):
            found = adapter_store("sgmv", step).read(weight.spec.site, 0, segment.slot)
            assert found is not None
            right[segment.start : segment.end, 0] = product(segment.take(x), found.a.T, to)
        return right

    return wrong


def sgmv_expand(to: torch.dtype) -> Function:
    def wrong(y: torch.Tensor, h: torch.Tensor, weight: Weight, step: Step, row_set: Any = "tokens") -> torch.Tensor:
        for segment in segments(step, row_set):
            found = adapter_store("sgmv", step).read(weight.spec.site, 0, segment.slot)
            assert found is not None
            own = h[segment.start : segment.end, 0, : found.b.shape[1]]
            y[segment.rows] = (y[segment.rows] + product(own, found.b.T, to)).to(y.dtype)
        return y

    return wrong


def rms_norm(to: torch.dtype) -> Function:
    def wrong(x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None) -> Any:
        total = x if residual is None else x + residual
        s = total.float()
        normed = (s * torch.rsqrt(summed(s * s, to) / s.shape[-1] + eps) * weight).to(x.dtype)
        return normed if residual is None else (normed, total)

    return wrong


def layer_norm(to: torch.dtype) -> Function:
    def wrong(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
        centred = x.float() - x.float().mean(-1, keepdim=True)
        y = centred * torch.rsqrt(summed(centred * centred, to) / x.shape[-1] + eps) * weight
        return (y if bias is None else y + bias).to(x.dtype)

    return wrong


def dense_attention(
    inputs: torch.dtype | None = None,
    scores: torch.dtype = F32,
    kept: torch.dtype = F32,
    p: torch.dtype = F32,
    values: torch.dtype = F32,
) -> Function:
    """``scores``, ``values``: accumulators; ``kept``: of the scores; ``p``: of the weights."""

    def wrong(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: Any, scale: float, causal: bool
    ) -> torch.Tensor:
        out = torch.zeros_like(q)
        for begin, end in pairwise(starts):
            read = [t[begin:end, 0] if inputs is None else t[begin:end, 0].to(inputs) for t in (q, k)]
            s = product(read[0], read[1].T, scores).to(kept).float() * scale
            mass = torch.exp(s - s.amax(-1, keepdim=True)).to(p).float()
            out[begin:end, 0] = (product(mass, v[begin:end, 0], values) / mass.sum(-1, keepdim=True)).to(q.dtype)
        return out

    return wrong


def moe_experts(up: torch.dtype = F32, down: torch.dtype = F32, inner: torch.dtype = F32) -> Function:
    """One expert, no adapters."""

    def wrong(x: torch.Tensor, gate_up: Any, back: Any, *_: Any) -> torch.Tensor:
        both = product(x, gate_up.tensor[0].T, up)
        if gate_up.bias is not None:
            both = both + gate_up.bias[0].float()
        gate, passed = both.chunk(2, dim=-1)
        act = (torch.nn.functional.silu(gate) * passed).to(inner)
        return product(act, back.tensor[0].T, down).to(x.dtype)

    return wrong


def silu_and_mul(to: torch.dtype) -> Function:
    def wrong(x: torch.Tensor) -> torch.Tensor:
        gate, up = x.float().chunk(2, dim=-1)
        return (gate / (1 + torch.exp(-gate).to(to).float()) * up).to(x.dtype)

    return wrong


def gelu(to: torch.dtype) -> Function:
    def wrong(x: torch.Tensor, approximate: str = "none") -> torch.Tensor:
        return (0.5 * x.float() * (1 + torch.erf(x.float() * 0.5**0.5).to(to).float())).to(x.dtype)

    return wrong


def rounding_first(operator: str, to: torch.dtype) -> Function:
    """The composite, its first operand rounded to ``to``."""
    right = TableBackend("cpu", {}).composites()[operator]
    return lambda x, *rest: right(x.to(to).to(x.dtype), *rest)


def rotary_embedding(to: torch.dtype) -> Function:
    right = TableBackend("cpu", {}).composites()["rotary_embedding"]

    def wrong(q: torch.Tensor, k: torch.Tensor, rope: Any, step: Step) -> Any:
        return right(q, k, replace(rope, cos=rope.cos.to(to).float(), sin=rope.sin.to(to).float()), step)

    return wrong


def sample(to: torch.dtype) -> Function:
    right = TableBackend("cpu", {}).composites()["sample"]

    def wrong(*arguments: Any) -> SampleOutput:
        found = right(*arguments)
        assert isinstance(found, SampleOutput)
        if found.logprobs is None or found.top_logprobs is None:
            return found
        return replace(found, logprobs=found.logprobs.to(to).float(), top_logprobs=found.top_logprobs.to(to).float())

    return wrong
