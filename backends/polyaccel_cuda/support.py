"""What the CUDA backend's kernels refuse."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from polyaccel.backend import Query, Reason
from polyaccel.backend.support import Supports

LARGEST_HEAD = 256
DTYPES = ("float32", "float16", "bfloat16")


def supports(operator: str) -> Supports:
    """The function that answers queries about an operator or station."""
    return _SUPPORTS.get(operator, _plain)


def _plain(query: Query) -> list[Reason]:
    reasons = []
    dtype = query.static.get("dtype")
    if dtype is not None and str(dtype).removeprefix("torch.") not in DTYPES:
        reasons.append(f"dtype {dtype} is none of {', '.join(DTYPES)}")
    if query.static.get("quantised"):
        reasons.append("the weight is quantised")
    return reasons


def _any_weight(query: Query) -> list[Reason]:
    return []


def _attention(query: Query) -> list[Reason]:
    reasons = _plain(query)
    heads, kv_heads, head_dim = query.integer("heads", 1), query.integer("kv_heads", 1), query.integer("head_dim", 64)
    if kv_heads < 1 or heads % kv_heads:
        reasons.append(f"{heads} query heads are no multiple of {kv_heads} key heads")
    if head_dim > LARGEST_HEAD:
        reasons.append(f"heads of {head_dim}, at most {LARGEST_HEAD}")
    return reasons


def _gate_up_act(query: Query) -> list[Reason]:
    act = query.static.get("act", "silu")
    return [*_plain(query), *([] if act == "silu" else [f"the activation is silu here, {act!r} was asked for"])]


def _qkv_rope_cache(query: Query) -> list[Reason]:
    reasons, head_dim = _plain(query), query.integer("head_dim", 1)
    rotary_dim = query.integer("rotary_dim", head_dim - head_dim % 2)
    if rotary_dim % 2 or rotary_dim > head_dim:
        reasons.append(f"rotary_dim {rotary_dim} is odd or above head_dim {head_dim}")
    return reasons


_SUPPORTS: Mapping[str, Supports] = MappingProxyType(
    {
        "linear": _any_weight,
        "dequantize": _any_weight,
        "gate_up_act": _gate_up_act,
        "paged_attention": _attention,
        "qkv_rope_cache": _qkv_rope_cache,
    }
)
