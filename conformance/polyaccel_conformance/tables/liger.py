"""Liger-Kernel: Triton kernels for training.

    polyaccel conformance run --table conformance/polyaccel_conformance/tables/liger.py:liger --device cuda

Signatures and arithmetic were read from the sources of 0.8.2. The functions are those of
``liger_kernel.transformers.functional``; only their forward passes are used.

Not in the table: ``linear``, attention, ``sgmv``, ``sample`` (Liger has none for inference), ``embedding`` (it reads
whatever row an id names and knows neither shards nor adapters), ``moe_route`` and ``moe_experts`` (its fused MoE takes
one tensor of all experts in the layout of transformers, and returns no partial sums).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from polyaccel.backend import Query
from polyaccel.backend.rope import RopeTable
from polyaccel.backend.step import Step
from polyaccel_conformance.promises import Kernel
from polyaccel_conformance.tables import usual
from polyaccel_conformance.tables.required import release, required
from polyaccel_conformance.tables.usual import dense_copy, tanh_only, whole_heads

DISTRIBUTION = "liger-kernel"
WIDEST = 65536
"""Columns of one Triton block; wider rows raise."""


def liger() -> Mapping[str, Kernel]:
    """The table.

    Raises:
        UsageError: liger-kernel is not installed.
    """
    functional = required("liger_kernel.transformers.functional", DISTRIBUTION)
    kernel = partial(
        usual.kernel, distribution=release(DISTRIBUTION), usual=(usual.DENSE, usual.UNCHECKED, usual.ONE_ROW)
    )

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
        q, k = (dense_copy(x).unsqueeze(0).transpose(1, 2) for x in (q, k))
        turned: tuple[Any, Any] = functional.liger_rope(q, k, cos, sin)
        return turned[0].transpose(1, 2).squeeze(0), turned[1].transpose(1, 2).squeeze(0)

    return {
        "rms_norm": kernel(
            rms_norm,
            "liger_rms_norm(x, weight, eps), or liger_fused_add_rms_norm(x, residual, weight, eps); casting_mode is "
            "the default, llama: statistics in float32, the product with the weight in the dtype of x",
            supports=_narrow,
        ),
        "layer_norm": kernel(
            layer_norm,
            "liger_layer_norm(x, weight, bias, eps); it always adds a bias, so a missing one becomes zeros",
            supports=_narrow,
        ),
        "silu_and_mul": kernel(
            silu_and_mul,
            "liger_swiglu(x[:, :n], x[:, n:]), which copies both; silu(gate) is rounded to the dtype of x",
            usual.TRITON_EXP,
            supports=_narrow,
        ),
        "gelu": kernel(
            gelu,
            "liger_geglu(x, 1): the gated form with ones, since there is no other; by tanh alone",
            supports=_narrow_tanh,
        ),
        "rotary_embedding": kernel(
            rotary_embedding,
            "liger_rope(q, k, cos, sin) on copies, since it works in place; each token's cos and sin, repeated for "
            "both halves of a head",
            supports=_halves_of_whole_heads,
        ),
    }


def _narrow(query: Query) -> list[str]:
    width = query.integer("hidden") or query.integer("n")
    return [f"rows of {width}; one block has {WIDEST} at most"] if width > WIDEST else []


def _narrow_tanh(query: Query) -> list[str]:
    return [*_narrow(query), *tanh_only(query)]


def _halves_of_whole_heads(query: Query) -> list[str]:
    reasons = [] if query.static.get("style") == "half" else ["only pairs of style half"]
    return [*reasons, *whole_heads(query)]
