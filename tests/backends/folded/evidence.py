"""Which torch operators the kernels may execute, by operator and station."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from polyaccel.backend.composite import linear as plain

_PRODUCT = ("aten::constant_pad_nd", "aten::mm", "aten::add", *plain.EVIDENCE["dequantize"])
_EXPAND = ("aten::mm", "aten::mul", "aten::ne", "aten::any", "aten::where", "aten::add")
_LINEAR = (*_PRODUCT, *_EXPAND, "aten::cat")
_NORM = ("aten::add", "aten::pow", "aten::mean", "aten::rsqrt", "aten::mul")
_ROPE = ("aten::index_select", "aten::mul", "aten::add", "aten::sub", "aten::cat", "aten::stack")
_WRITE = ("aten::ge", "aten::index", "aten::index_put_")
_ACTIVATION = ("aten::silu", "aten::mul")
_LOOKUP = ("aten::sub", "aten::ge", "aten::lt", "aten::bitwise_and", "aten::clamp", "aten::index", "aten::where")
_REDUCE = ("aten::add_", "aten::sum", "aten::stack")

EVIDENCE: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "linear": _PRODUCT,
        "dequantize": ("aten::mul",),
        "embedding": (*_LOOKUP, *_EXPAND),
        "rms_norm": _NORM,
        "rotary_embedding": _ROPE,
        "silu_and_mul": _ACTIVATION,
        "select_rows": ("aten::index",),
        "write_kv_cache": _WRITE,
        "paged_attention": (
            "aten::_softmax",
            "aten::add",
            "aten::bitwise_and_",
            "aten::bitwise_not",
            "aten::bmm",
            "aten::floor_divide",
            "aten::gt",
            "aten::index",
            "aten::le",
            "aten::masked_fill",
            "aten::mul",
            "aten::remainder",
            "aten::sub",
        ),
        "sgmv": (*_PRODUCT, *_EXPAND),
        "moe_route": (
            "aten::_softmax",
            "aten::add",
            "aten::clamp",
            "aten::div",
            "aten::gather",
            "aten::mul",
            "aten::scatter_",
            "aten::exp",
            "aten::neg",
            "aten::reciprocal",
            "aten::sort",
            "aten::sum",
            "aten::where",
        ),
        "moe_experts": (*_PRODUCT, *_EXPAND, *_ACTIVATION, "aten::eq", "aten::index", "aten::index_add_"),
        "sample": (
            "aten::add",
            "aten::amax",
            "aten::argmax",
            "aten::bitwise_and",
            "aten::bitwise_not",
            "aten::bitwise_or",
            "aten::clamp",
            "aten::constant_pad_nd",
            "aten::cumsum",
            "aten::div",
            "aten::eq",
            "aten::exp",
            "aten::gather",
            "aten::ge",
            "aten::gt",
            "aten::index_add_",
            "aten::index_copy_",
            "aten::index_select",
            "aten::le",
            "aten::log",
            "aten::lt",
            "aten::minimum",
            "aten::mul",
            "aten::nan_to_num",
            "aten::ne",
            "aten::scatter_",
            "aten::sort",
            "aten::sub",
            "aten::sum",
            "aten::where",
        ),
        "all_reduce": _REDUCE,
        "all_gather": ("aten::cat",),
        "column_linear": _LINEAR,
        "qkv_rope_cache": (*_LINEAR, *_NORM, *_ROPE, *_WRITE),
        "gate_up_act": (*_LINEAR, *_ACTIVATION),
        "row_parallel_linear": (*_LINEAR, *_REDUCE),
        "row_parallel_add_norm": (*_LINEAR, *_NORM, *_REDUCE),
    }
)
