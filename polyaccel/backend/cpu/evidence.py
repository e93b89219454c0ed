"""Which torch operators the CPU backend's forms may execute, by operator and station: what a check from outside allows.

Views, allocation, filling, casts and copies need no declaration. Where an operator is the composite, what that executes
is listed: a change there is one here.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

_PRODUCT = (
    "mkldnn::_linear_pointwise",
    "mkldnn::_convolution_pointwise",
    "aten::linear",
    "aten::addmm",
    "aten::mm",
    "aten::constant_pad_nd",
)
_DEQUANTISE = ("aten::bitwise_and", "aten::__rshift__", "aten::stack", "aten::sub", "aten::mul", "aten::_to_dense")
_LINEAR = (*_PRODUCT, *_DEQUANTISE)
_BATCHES = ("aten::bmm", "aten::baddbmm", "aten::addmm_", "aten::mul_", "aten::add_", "aten::index_select")
_SCATTER = ("aten::index_add_", "aten::index_copy_")
_SEGMENTS = ("aten::mm", "aten::mul", "aten::add_", "aten::index_select", "aten::index_add_")
_LORA = (*_BATCHES, *_SCATTER, *_SEGMENTS, "aten::constant_pad_nd")
_NORM = (
    "aten::linalg_vector_norm",
    "aten::addcmul",
    "aten::rsqrt_",
    "aten::mul",
    "aten::mul_",
    "aten::add",
)
_ANGLES = ("aten::index_select", "aten::cat", "aten::neg", "aten::stack")
_TURN = ("aten::mul", "aten::mul_", "aten::addcmul_", "aten::roll", "aten::flip")
_ROPE = (*_ANGLES, *_TURN)
_KV_ROWS = ("aten::where", "aten::lt", "aten::div", "aten::add", "aten::cat")
_WRITE = (*_KV_ROWS, "aten::index_put_")
_ACTIVATION = ("aten::silu", "aten::mul_")
_FLASH = "aten::_scaled_dot_product_flash_attention_for_cpu"
_MASK = ("aten::sub", "aten::add", "aten::add_", "aten::lt", "aten::ge", "aten::bitwise_or_", "aten::masked_fill_")
_DECODE = (
    "aten::baddbmm",
    "aten::bmm",
    "aten::_softmax",
    "aten::index_select",
    "aten::index_fill_",
    "aten::index_copy_",
    "aten::amax",
    "aten::sub_",
    "aten::exp_",
    "aten::sum",
    "aten::mul",
    "aten::div_",
    "aten::embedding_bag",
    "aten::_embedding_bag_forward_only",
)
_LOOKUP = ("aten::sub", "aten::ge", "aten::lt", "aten::bitwise_and", "aten::clamp", "aten::where", "aten::index_select")
_REDUCE = ("c10d::allreduce_", "c10d::_allgather_base_", "c10d::allgather_", "aten::add_", "aten::sum", "aten::stack")
_CHOICE = ("aten::nan_to_num", "aten::argmax", "aten::amax", "aten::gather", "aten::add_")
_COUNTS = (
    "aten::add",
    "aten::clamp",
    "aten::eq",
    "aten::index_add_",
    "aten::index_copy_",
    "aten::index_select",
    "aten::mul",
    "aten::ne",
    "aten::where",
)
_FILTERS = (
    "aten::bitwise_and",
    "aten::bitwise_or",
    "aten::constant_pad_nd",
    "aten::cumsum",
    "aten::div",
    "aten::exp",
    "aten::ge",
    "aten::gt",
    "aten::le",
    "aten::log",
    "aten::lt",
    "aten::minimum",
    "aten::scatter_",
    "aten::sort",
    "aten::sub",
    "aten::sum",
)
_EXPERTS = (
    "aten::add",
    "aten::bmm",
    "aten::clamp",
    "aten::constant_pad_nd",
    "aten::cumsum",
    "aten::div",
    "aten::eq",
    "aten::ge",
    "aten::index_add_",
    "aten::index_copy_",
    "aten::index_select",
    "aten::le",
    "aten::lt",
    "aten::silu",
    "aten::sort",
    "aten::sum",
    "aten::where",
)

_EVIDENCE: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "linear": _LINEAR,
        "dequantize": _DEQUANTISE,
        "embedding": (*_LOOKUP, *_SEGMENTS),
        "rms_norm": _NORM,
        "layer_norm": ("aten::mean", "aten::sub", "aten::pow", "aten::add", "aten::rsqrt", "aten::mul"),
        "rotary_embedding": _ROPE,
        "silu_and_mul": _ACTIVATION,
        "gelu": ("aten::gelu", "aten::erf", "aten::mul", "aten::add"),
        "select_rows": ("aten::index_select",),
        "write_kv_cache": _WRITE,
        "paged_attention": (_FLASH, *_DECODE, *_MASK),
        "dense_attention": (
            "aten::add",
            "aten::amax",
            "aten::bitwise_not",
            "aten::bmm",
            "aten::cat",
            "aten::div",
            "aten::exp",
            "aten::le",
            "aten::masked_fill",
            "aten::maximum",
            "aten::mul",
            "aten::sub",
            "aten::sum",
        ),
        "sgmv": _LORA,
        "sgmv_shrink": _SEGMENTS,
        "sgmv_expand": _SEGMENTS,
        "moe_route": (
            "aten::_softmax",
            "aten::add",
            "aten::clamp",
            "aten::div",
            "aten::exp",
            "aten::gather",
            "aten::mul",
            "aten::neg",
            "aten::reciprocal",
            "aten::scatter_",
            "aten::sort",
            "aten::sum",
            "aten::where",
        ),
        "moe_experts": (*_LINEAR, *_LORA, *_EXPERTS),
        "sample": (*_CHOICE, *_COUNTS, *_FILTERS),
        "column_linear": (*_LINEAR, *_LORA),
        "qkv_rope_cache": (*_LINEAR, *_LORA, *_NORM, *_ROPE, *_WRITE),
        "gate_up_act": (*_LINEAR, *_LORA, *_ACTIVATION),
        "row_parallel_linear": (*_LINEAR, *_LORA, *_REDUCE),
        "row_parallel_add_norm": (*_LINEAR, *_LORA, *_NORM, *_REDUCE),
        "all_reduce": _REDUCE,
        "all_gather": ("c10d::allgather_", "c10d::_allgather_base_", "aten::cat"),
        "reduce_scatter": (*_REDUCE, "c10d::reduce_scatter_", "c10d::_reduce_scatter_base_"),
        "all_to_all": ("c10d::alltoall_", "c10d::alltoall_base_"),
        "broadcast": ("c10d::broadcast_",),
        "barrier": ("c10d::barrier",),
    }
)


def evidence(operator: str) -> tuple[str, ...]:
    """Torch operators that a call may execute."""
    return _EVIDENCE.get(operator, ())
