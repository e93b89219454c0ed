"""What the CPU backend's forms refuse."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from polyaccel.backend.support import Query, Reason, Supports


def supports(operator: str) -> Supports:
    """The function that answers queries about an operator or station."""
    return _SUPPORTS.get(operator, _everything)


def _everything(query: Query) -> list[Reason]:
    return []


def _gate_up_act(query: Query) -> list[Reason]:
    act = query.static.get("act", "silu")
    return [] if act == "silu" else [f"the activation is silu here, {act!r} was asked for"]


def _groups(query: Query) -> list[Reason]:
    heads, kv_heads = query.integer("heads", 1), query.integer("kv_heads", 1)
    if kv_heads < 1 or heads % kv_heads:
        return [f"{heads} query heads are no multiple of {kv_heads} key heads"]
    return []


def _qkv_rope_cache(query: Query) -> list[Reason]:
    reasons = []
    head_dim = query.integer("head_dim", 1)
    rotary_dim = query.integer("rotary_dim", head_dim - head_dim % 2)
    if rotary_dim % 2 or rotary_dim > head_dim:
        reasons.append(f"rotary_dim {rotary_dim} is odd or above head_dim {head_dim}")
    return reasons


_SUPPORTS: Mapping[str, Supports] = MappingProxyType(
    {"gate_up_act": _gate_up_act, "paged_attention": _groups, "qkv_rope_cache": _qkv_rope_cache}
)
