"""Which operators the NPU backend may execute, by operator and station: what a check from outside allows; and what the
ledger calls the launches of a captured step with adapters, whose number a check holds against these names.

Those of torch_npu are named as they are registered; plain ones of torch are aclnn functions on this device.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

_PRODUCT = ("aten::mm", "aten::addmm", "aten::add")
_CAST = ("aten::_to_copy", "aten::copy_")
_SGMV = (
    "npu::npu_grouped_matmul",
    "aten::cat",
    "aten::mul",
    "aten::index_select",
    "aten::index_add_",
    "aten::add_",
    "aten::add",
    *_CAST,
)
_GRAPH = (
    *("npu.matmul", "npu.sgmv_cover", "npu.sgmv_own", "npu.sgmv_shrink", "npu.sgmv_stack", "npu.sgmv_mix"),
    *("npu.sgmv_pick", "npu.sgmv_expand", "npu.sgmv_join", "npu.sgmv_add", "npu.sgmv_land"),
)
"""What a captured step with adapters launches at a linear site, by the ledger's names."""
_GRAPH_LOOKUP = ("npu.embedding", "npu.embedding.lookup", *_GRAPH[1:3], *_GRAPH[5:8], "npu.sgmv_add")
_NORM = ("npu::npu_rms_norm", "npu::npu_add_rms_norm")
_ROPE = ("npu::npu_rotary_mul", "aten::index_select", "aten::cat", *_CAST)
_WRITE = ("npu::npu_scatter_pa_kv_cache", "aten::index_select")
_FIA = ("npu::npu_fused_infer_attention_score", "aten::cat", "aten::sub", "aten::lt", "aten::copy_")
_DEQUANTISE = (
    "aten::bitwise_and",
    "aten::__rshift__",
    "aten::stack",
    "aten::repeat_interleave",
    "aten::sub",
    "aten::mul",
)
_SUM = ("c10d::allreduce_",)
_FUSED = ("npu::npu_mm_all_reduce_base",)
_SAMPLE = (
    "aten::add",
    "aten::add_",
    "aten::amax",
    "aten::argmax",
    "aten::bitwise_and",
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
)

_EVIDENCE: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "embedding": (
            "aten::embedding",
            "aten::clamp",
            "aten::sub",
            "aten::ge",
            "aten::lt",
            "aten::bitwise_and",
            "aten::where",
            *_SGMV,
            *_GRAPH_LOOKUP,
        ),
        "linear": (*_PRODUCT, *_DEQUANTISE),
        "dequantize": _DEQUANTISE,
        "rms_norm": _NORM,
        "layer_norm": ("aten::native_layer_norm",),
        "rotary_embedding": _ROPE,
        "silu_and_mul": ("npu::npu_swiglu",),
        "gelu": ("npu::npu_gelu",),
        "select_rows": ("aten::index_select",),
        "write_kv_cache": _WRITE,
        "paged_attention": _FIA,
        "dense_attention": _FIA,
        "sgmv": _SGMV,
        "sgmv_shrink": _SGMV,
        "sgmv_expand": _SGMV,
        "sample": _SAMPLE,
        "column_linear": (*_PRODUCT, *_SGMV, *_GRAPH),
        "qkv_rope_cache": (*_PRODUCT, *_SGMV, *_NORM, *_ROPE, *_WRITE, *_GRAPH),
        "gate_up_act": (*_PRODUCT, *_SGMV, "npu::npu_swiglu", *_GRAPH),
        "row_parallel_linear": (*_PRODUCT, *_SGMV, *_SUM, *_FUSED, *_GRAPH),
        "row_parallel_add_norm": (*_PRODUCT, *_SGMV, *_SUM, *_FUSED, *_NORM, *_GRAPH),
        "all_reduce": _SUM,
        "all_gather": ("c10d::_allgather_base_", "aten::copy_"),
        "reduce_scatter": ("c10d::_reduce_scatter_base_",),
        "all_to_all": ("c10d::alltoall_base_",),
        "broadcast": ("c10d::broadcast_",),
        "barrier": ("c10d::barrier",),
    }
)


def evidence(operator: str) -> tuple[str, ...]:
    """Operators of torch that a call may execute."""
    return _EVIDENCE.get(operator, ())
