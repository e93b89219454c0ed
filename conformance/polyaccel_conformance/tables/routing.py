"""Routing by ``topk_softmax``, which vLLM and FlagGems share: softmax over all experts, then the largest."""

from __future__ import annotations

from collections.abc import Callable

import torch

from polyaccel.backend import Query

MOST_CHOICES = 32


def by_topk_softmax(topk_softmax: Callable[..., object]) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """``moe_route`` by a kernel that writes to the weights, the experts and the rows it is given."""

    def moe_route(
        logits: torch.Tensor,
        top_k: int,
        scoring: str,
        renormalise: bool,
        bias: torch.Tensor | None = None,
        groups: int = 1,
        topk_groups: int = 1,
        scale: float = 1.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        weights = torch.empty((logits.shape[0], top_k), dtype=torch.float32, device=logits.device)
        ids, rows = (torch.empty_like(weights, dtype=torch.int32) for _ in range(2))
        topk_softmax(weights, ids, rows, logits.contiguous(), renormalise)
        return weights * scale, ids

    return moe_route


def softmax_only(query: Query) -> list[str]:
    """Reasons why ``topk_softmax`` cannot answer."""
    static = query.static
    reasons = []
    if static.get("scoring") != "softmax_topk":
        reasons.append(f"scoring {static.get('scoring')}: only softmax_topk")
    if static.get("bias"):
        reasons.append("adds no bias")
    if query.integer("groups", 1) > 1:
        reasons.append("knows no groups")
    if query.integer("top_k") > MOST_CHOICES:
        reasons.append(f"{query.integer('top_k')} choices; at most {MOST_CHOICES}")
    return reasons
