"""Liger-Kernel: Triton kernels for training.

    polyaccel conformance run --table conformance/polyaccel_conformance/tables/liger.py:liger --device cuda

Signatures and arithmetic were read from the sources of 0.8.2. The functions are those of
``liger_kernel.transformers.functional``; only their forward passes are used.

Not in the table: ``linear``, attention, ``sgmv``, ``sample`` (Liger has none for inference), ``embedding`` (it reads
whatever row an id names and knows neither shards nor adapters), ``moe_route`` and ``moe_experts`` (its fused MoE takes
one tensor of all experts in the layout of transformers, and returns no partial sums).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from polyaccel.backend import Query
from polyaccel.backend.rope import RopeTable
from polyaccel.backend.step import Step
from polyaccel.backend.support import Supports
from polyaccel_conformance.promises import Kernel, NotPromised
from polyaccel_conformance.tables.required import release, required
from polyaccel_conformance.tables.usual import DENSE, ONE_ROW, TRITON_EXP, UNCHECKED

DISTRIBUTION = "liger-kernel"
WIDEST = 65536
"""Columns of one Triton block; wider rows raise."""


def liger() -> Mapping[str, Kernel]:
    """The table.

    Raises:
        UsageError: liger-kernel is not installed.
    """
    functional = required("liger_kernel.transformers.functional", DISTRIBUTION)
    version = release(DISTRIBUTION)

    def rms_norm(
        x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        if residual is None:
            normed: torch.Tensor = functional.liger_rms_norm(x, weight, eps)
            return normed
        normed, s = functional.liger_fused_add_rms_norm(x, residual, weight, eps)
        return normed, s

    def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
        y: torch.Tensor = functional.liger_layer_norm(
            x, weight, torch.zeros_like(weight) if bias is None else bias, eps
        )
        return y

    def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, -1)
        y: torch.Tensor = functional.liger_swiglu(gate, up)
        return y

    def gelu(x: torch.Tensor, approximate: str = "tanh") -> torch.Tensor:
        y: torch.Tensor = functional.liger_geglu(x, torch.ones_like(x))
        return y

    def rotary_embedding(
        q: torch.Tensor, k: torch.Tensor, rope: RopeTable, step: Step
    ) -> tuple[torch.Tensor, torch.Tensor]:
        positions = step.tensor("positions")
        cos, sin = (table.index_select(0, positions).repeat(1, 2).unsqueeze(0) for table in (rope.cos, rope.sin))
        # The kernel works in place on whatever is dense already.
        q, k = (x.clone(memory_format=torch.contiguous_format).unsqueeze(0).transpose(1, 2) for x in (q, k))
        turned: tuple[Any, Any] = functional.liger_rope(q, k, cos, sin)
        return turned[0].transpose(1, 2).squeeze(0), turned[1].transpose(1, 2).squeeze(0)

    def kernel(fn: Callable[..., object], supports: Supports, mapping: str, *not_promised: NotPromised) -> Kernel:
        usual = (DENSE, UNCHECKED, ONE_ROW, *not_promised)
        return Kernel(fn, supports=supports, distribution=version, mapping=mapping, not_promised=usual)

    return {
        "rms_norm": kernel(
            rms_norm,
            _narrow,
            "liger_rms_norm(x, weight, eps), or liger_fused_add_rms_norm(x, residual, weight, eps); casting_mode is "
            "the default, llama: statistics in float32, the product with the weight in the dtype of x",
        ),
        "layer_norm": kernel(
            layer_norm,
            _narrow,
            "liger_layer_norm(x, weight, bias, eps); it always adds a bias, so a missing one becomes zeros",
        ),
        "silu_and_mul": kernel(
            silu_and_mul,
            _narrow,
            "liger_swiglu(x[:, :n], x[:, n:]), which copies both; silu(gate) is rounded to the dtype of x",
            TRITON_EXP,
        ),
        "gelu": kernel(
            gelu, _tanh_only, "liger_geglu(x, 1): the gated form with ones, since there is no other; by tanh alone"
        ),
        "rotary_embedding": kernel(
            rotary_embedding,
            _whole_heads,
            "liger_rope(q, k, cos, sin) on copies, since it works in place; each token's cos and sin, repeated for "
            "both halves of a head",
        ),
    }


def _narrow(query: Query) -> list[str]:
    width = query.integer("hidden") or query.integer("n")
    return [f"rows of {width}; one block has {WIDEST} at most"] if width > WIDEST else []


def _tanh_only(query: Query) -> list[str]:
    found = _narrow(query)
    return found if query.static.get("approximate") == "tanh" else [*found, "only the approximation by tanh"]


def _whole_heads(query: Query) -> list[str]:
    head, rotary = query.integer("head_dim"), query.integer("rotary_dim")
    reasons = [] if query.static.get("style") == "half" else ["only pairs of style half"]
    return reasons if head == rotary else [*reasons, f"rotates whole heads of {head}, not {rotary} dimensions"]
