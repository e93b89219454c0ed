"""FlagGems: PyTorch's operators and the usual fused ones in Triton, for many vendors.

    polyaccel conformance run --table conformance/polyaccel_conformance/tables/flaggems.py:flaggems --device cuda

Signatures and arithmetic were read from the sources of 5.0.2. The functions are called directly; nothing is registered
with PyTorch.

Not in the table: ``linear`` (``flag_gems.mm`` and ``addmm`` are tuned anew for every shape, which a run of many small
shapes cannot wait for), ``embedding`` (reads whatever row an id names; no shards, no adapters), attention (the paged
form takes block tables and lengths on the device in the layout of FlashAttention), ``moe_experts`` (private layouts).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch

from polyaccel.backend.composite.kv_cache import TensorKVCache
from polyaccel.backend.rope import RopeTable
from polyaccel.backend.step import Step
from polyaccel_conformance.promises import Kernel, NotPromised
from polyaccel_conformance.tables import usual
from polyaccel_conformance.tables.required import release, required
from polyaccel_conformance.tables.routing import MOST_CHOICES, by_topk_softmax, softmax_only
from polyaccel_conformance.tables.usual import dense_copy

DISTRIBUTION = "flag-gems"
APART = tuple(
    NotPromised(
        checks=("values.exact", "memory.reads", "layout.arguments", "nonfinite.rules"),
        axes=f"layouts.{name}=row_padded",
        reason="heads that do not lie side by side: only the stride from token to token is read",
    )
    for name in ("k", "v")
)


def flaggems() -> Mapping[str, Kernel]:
    """The table.

    Raises:
        UsageError: flag-gems is not installed.
    """
    gems = required("flag_gems", DISTRIBUTION)
    kernel = partial(
        usual.kernel, distribution=release(DISTRIBUTION), usual=(usual.DENSE, usual.UNCHECKED, usual.ONE_ROW)
    )

    def rms_norm(
        x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        shape = [x.shape[-1]]
        if residual is None:
            normed: torch.Tensor = gems.rms_norm(x, shape, weight, eps)
            return normed
        # Both operands are overwritten where they are dense.
        normed, s = gems.fused_add_rms_norm(dense_copy(x), dense_copy(residual), shape, weight, eps)
        return normed, s

    def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
        y: torch.Tensor = gems.layer_norm(x, [x.shape[-1]], weight, bias, eps)[0]
        return y

    def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = gems.silu_and_mul(*x.chunk(2, -1))
        return y

    def gelu(x: torch.Tensor, approximate: str = "none") -> torch.Tensor:
        y: torch.Tensor = gems.gelu(x, approximate=approximate)
        return y

    def rotary_embedding(
        q: torch.Tensor, k: torch.Tensor, rope: RopeTable, step: Step
    ) -> tuple[torch.Tensor, torch.Tensor]:
        interleaved = rope.style == "interleaved"
        turned: tuple[torch.Tensor, torch.Tensor] = gems.apply_rotary_pos_emb(
            q, k, rope.cos, rope.sin, step.tensor("positions"), interleaved
        )
        return turned

    def write_kv_cache(k: torch.Tensor, v: torch.Tensor, kv: TensorKVCache, layer: int, step: Step) -> None:
        keys, values = kv.blocks(layer)
        gems.reshape_and_cache_flash(k, v, keys, values, step.tensor("kv_slots"), "auto", None, None)

    return {
        "rms_norm": kernel(
            rms_norm,
            "rms_norm(x, [hidden], weight, eps); with a residual fused_add_rms_norm on copies, since it works in "
            "place; its statistics are of the sum before rounding, which the contract allows",
        ),
        "layer_norm": kernel(layer_norm, "layer_norm(x, [hidden], weight, bias, eps)[0]; tuned anew for every shape"),
        "silu_and_mul": kernel(silu_and_mul, "silu_and_mul(x[:, :n], x[:, n:])", usual.TRITON_EXP),
        "gelu": kernel(gelu, "gelu(x, approximate=approximate)"),
        "rotary_embedding": kernel(
            rotary_embedding,
            "apply_rotary_pos_emb(q, k, cos, sin, positions, interleaved)",
            supports=usual.whole_heads,
        ),
        "write_kv_cache": kernel(
            write_kv_cache,
            "reshape_and_cache_flash(k, v, keys, values, slots, 'auto', None, None) on the blocks of a layer",
            *APART,
        ),
        "moe_route": kernel(
            by_topk_softmax(lambda *operands: gems.topk_softmax(*operands)),
            f"topk_softmax(weights, ids, rows, logits, renormalise), then times the scale; {MOST_CHOICES} at most",
            supports=softmax_only,
        ),
    }
