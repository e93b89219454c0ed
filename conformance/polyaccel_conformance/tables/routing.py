"""What the tables' routing kernels take: softmax over all experts, then the largest."""

from __future__ import annotations

from polyaccel.backend import Query

MOST_CHOICES = 32


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
