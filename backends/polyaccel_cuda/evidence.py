"""What each native operator may execute: Triton kernels by their names, and torch operators."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from polyaccel.backend.composite.linear import EVIDENCE as PLAIN

_PRODUCT = ("one_row_kernel", "few_rows_kernel", "aten::linear", "aten::addmm", "aten::mm")
_EXPAND = ("expand_kernel",)
_NCCL = ("*nccl*DevKernel*",)
_SUM = ("one_shot_all_reduce_kernel", *_NCCL)
_COPY = "*direct_copy_kernel_cuda*"
"""Of an operand whose layout a kernel does not take; the ledger counts it."""
_SAMPLE = (
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
)
_EVIDENCE: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "embedding": ("embedding_kernel", "adapted_embedding_kernel"),
        "linear": (*_PRODUCT, *PLAIN["linear"]),
        "dequantize": PLAIN["dequantize"],
        "rms_norm": ("rms_norm_kernel", _COPY),
        "layer_norm": ("layer_norm_kernel", _COPY),
        "rotary_embedding": ("rotate_kernel", _COPY),
        "silu_and_mul": ("silu_and_mul_kernel", _COPY),
        "gelu": ("gelu_kernel", _COPY),
        "select_rows": ("aten::index_select",),
        "write_kv_cache": ("write_kv_kernel", _COPY),
        "paged_attention": ("decode_kernel", "combine_kernel", "prefill_kernel", _COPY, "*FillFunctor*"),
        "sgmv": (*_PRODUCT, *_EXPAND),
        "sgmv_shrink": (*_PRODUCT, "take_rank_rows_kernel"),
        "sgmv_expand": ("expand_triples_kernel", _COPY),
        "sample": _SAMPLE,
        "column_linear": (*_PRODUCT, *_EXPAND),
        "qkv_rope_cache": (*_PRODUCT, "rope_cache_kernel"),
        "gate_up_act": (*_PRODUCT, "silu_and_mul_kernel", "adapted_silu_and_mul_kernel"),
        "row_parallel_linear": (*_PRODUCT, *_EXPAND, *_SUM, _COPY),
        "row_parallel_add_norm": (*_PRODUCT, *_EXPAND, "rms_norm_kernel", *_SUM, _COPY),
        "all_reduce": (*_SUM, _COPY),
        "all_gather": (*_NCCL, _COPY),
        "reduce_scatter": (*_NCCL, _COPY),
        "all_to_all": (*_NCCL, _COPY),
        "broadcast": (*_NCCL, _COPY),
        "barrier": ("c10d::barrier",),
    }
)


def evidence(operator: str) -> tuple[str, ...]:
    return _EVIDENCE.get(operator, ())
