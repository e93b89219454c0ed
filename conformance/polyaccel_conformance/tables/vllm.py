"""vLLM's custom operators in CUDA.

    polyaccel conformance run --table conformance/polyaccel_conformance/tables/vllm.py:vllm --device cuda

Signatures were read from ``vllm/_custom_ops.py`` of 2026, arithmetic from ``csrc/`` (layernorm, activation, position
encoding, top-k softmax, cache); the activations are registered operators without a Python function of their own. All of
them write to a tensor that the caller allocates, or in place; the mapping allocates and copies.

Not in the table: ``paged_attention`` (``paged_attention_v1`` and ``v2`` answer one query a sequence, from a cache whose
keys lie in pieces of 16 bytes), ``linear`` (vLLM calls PyTorch's), ``sgmv`` (Triton kernels with private metadata),
``moe_experts`` (private layouts), ``sample`` (PyTorch's operators).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch

from polyaccel.backend import Query
from polyaccel.backend.composite.kv_cache import TensorKVCache
from polyaccel.backend.rope import RopeTable
from polyaccel.backend.step import Step
from polyaccel_conformance.promises import Kernel, NotPromised
from polyaccel_conformance.tables import usual
from polyaccel_conformance.tables.required import release, required
from polyaccel_conformance.tables.routing import by_topk_softmax, softmax_only
from polyaccel_conformance.tables.usual import dense_copy

DISTRIBUTION = "vllm"
SIXTEEN_BITS = NotPromised(
    checks=("values.*",),
    axes="dtype=*float16",
    reason="gelu_new rounds x^3, the argument of tanh and its value to the dtype of x, as in the model that it copies",
)
CUBE = NotPromised(
    checks=("values.*", "nonfinite.rules"),
    axes="dtype=float16",
    reason="gelu_new computes x^3 in the dtype of x, which float16 overflows from |x| of about 40 on",
)


def vllm() -> Mapping[str, Kernel]:
    """The table.

    Raises:
        UsageError: vllm is not installed.
    """
    custom = required("vllm._custom_ops", DISTRIBUTION)
    kernel = partial(usual.kernel, distribution=release(DISTRIBUTION), usual=(usual.DENSE, usual.UNCHECKED))

    def rms_norm(
        x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        if residual is not None:
            normed, s = dense_copy(x), dense_copy(residual)
            if x.numel():
                custom.fused_add_rms_norm(_rows(normed), _rows(s), weight, eps)
            return normed, s
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        if x.numel():
            custom.rms_norm(_rows(out), x.reshape(-1, x.shape[-1]), weight, eps)
        return out

    def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
        out = x.new_empty((x.shape[0], x.shape[1] // 2))
        if out.numel():
            # Strides are neither read nor checked.
            torch.ops._C.silu_and_mul(out, x.contiguous())
        return out

    def gelu(x: torch.Tensor, approximate: str = "tanh") -> torch.Tensor:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        if x.numel():
            torch.ops._C.gelu_new(out, x.contiguous())
        return out

    def rotary_embedding(
        q: torch.Tensor, k: torch.Tensor, rope: RopeTable, step: Step
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q, k = dense_copy(q), dense_copy(k)
        if q.shape[0]:
            table = torch.cat((rope.cos, rope.sin), -1)
            custom.rotary_embedding(step.tensor("positions"), q, k, q.shape[-1], table, rope.style == "half")
        return q, k

    def write_kv_cache(k: torch.Tensor, v: torch.Tensor, kv: TensorKVCache, layer: int, step: Step) -> None:
        keys, values = kv.blocks(layer)
        if k.shape[0]:
            scale = torch.ones((), dtype=torch.float32, device=k.device)
            custom.reshape_and_cache_flash(k, v, keys, values, step.tensor("kv_slots"), "auto", scale, scale)

    def topk_softmax(
        weights: torch.Tensor, ids: torch.Tensor, rows: torch.Tensor, logits: torch.Tensor, renormalise: bool
    ) -> None:
        if logits.shape[0]:
            custom.topk_softmax(weights, ids, rows, logits.float(), renormalise)

    return {
        "rms_norm": kernel(
            rms_norm,
            "rms_norm(out, x as rows, weight, eps); with a residual fused_add_rms_norm on copies. x * rsqrt(...) is "
            "rounded to the dtype of x before the product with the weight, which the contract allows",
        ),
        "silu_and_mul": kernel(
            silu_and_mul,
            "_C.silu_and_mul(out, x) on a dense x; silu is rounded to the dtype of x, which the contract allows",
        ),
        "gelu": kernel(
            gelu,
            "_C.gelu_new(out, x) on a dense x, for tanh alone",
            SIXTEEN_BITS,
            CUBE,
            supports=usual.tanh_only,
        ),
        "rotary_embedding": kernel(
            rotary_embedding,
            "rotary_embedding(positions, q, k, head_dim, [cos, sin], half) on copies, in place; the table is float32",
            supports=_grouped_heads,
        ),
        "write_kv_cache": kernel(
            write_kv_cache,
            "reshape_and_cache_flash(k, v, keys, values, slots, 'auto', 1, 1) on the blocks of a layer",
        ),
        "moe_route": kernel(
            by_topk_softmax(topk_softmax),
            "topk_softmax(weights, ids, rows, float32 logits, renormalise), then times the scale",
            supports=softmax_only,
        ),
    }


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.view(-1, x.shape[-1])


def _grouped_heads(query: Query) -> list[str]:
    heads, kv_heads = query.integer("heads"), query.integer("kv_heads")
    return [] if kv_heads and heads % kv_heads == 0 else [f"{heads} heads are no multiple of {kv_heads}"]
