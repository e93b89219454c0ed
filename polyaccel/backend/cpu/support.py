"""What the CPU backend's forms refuse, and which torch kernels they may call."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from polyaccel.backend.support import Query, Reason, Supports

_LINEAR = ("mkldnn::_linear_pointwise", "mkldnn::_linear_pointwise.binary", "aten::linear", "aten::addmm", "aten::mm")
_LORA = ("aten::bmm", "aten::baddbmm", "aten::addmm_", "aten::index_add_")
_NORM = ("aten::linalg_vector_norm", "aten::rsqrt_", "aten::mul")
_ROPE = ("aten::mul_", "aten::addcmul_", "aten::roll")
_WRITE = ("aten::index_put_",)

_EVIDENCE: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "linear": _LINEAR,
        "embedding": ("aten::index_select",),
        "rms_norm": _NORM,
        "rotary_embedding": _ROPE,
        "silu_and_mul": ("aten::silu", "aten::mul_"),
        "select_rows": ("aten::index_select",),
        "write_kv_cache": _WRITE,
        "paged_attention": ("aten::bmm", "aten::exp_", "aten::_scaled_dot_product_flash_attention_for_cpu"),
        "sgmv": _LORA,
        "sample": ("aten::argmax", "aten::amax"),
        "column_linear": _LINEAR + _LORA,
        "qkv_rope_cache": _LINEAR + _LORA + _NORM + _ROPE + _WRITE,
        "gate_up_act": (*_LINEAR, *_LORA, "aten::silu"),
        "row_parallel_linear": _LINEAR + _LORA,
        "row_parallel_add_norm": _LINEAR + _LORA + _NORM,
    }
)


def evidence(operator: str) -> tuple[str, ...]:
    """Torch operators that a call may be recognised by; empty for those in plain torch."""
    return _EVIDENCE.get(operator, ())


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
