"""What each native operator may execute: Triton kernels by their names, and torch operators."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from polyaccel.backend.composite.linear import EVIDENCE as PLAIN
from polyaccel.backend.cpu.evidence import evidence as by_torch

_PRODUCT = ("one_row_kernel", "few_rows_kernel", "many_rows_kernel", "aten::linear", "aten::addmm", "aten::mm")
_SHRINK = ("shrink_kernel", "sum_planes_kernel")
_EXPAND = ("expand_kernel", "lone_expand_kernel", "tiled_expand_kernel", *_SHRINK)
_NCCL = ("*nccl*DevKernel*",)
_SUM = ("one_shot_all_reduce_kernel", "two_shot_all_reduce_kernel", *_NCCL)
_PARTS = ("Memcpy PtoP*", "Memcpy DtoD*", "meet_kernel", "add_received_kernel")
"""Of a product's parts, pushed by a copy engine."""
_COPY = "*direct_copy_kernel_cuda*"
"""Of an operand whose layout a kernel does not take; the ledger counts it."""
_SAMPLE = (
    "sample_kernel",
    "adjust_scores_kernel",
    "top_scores_kernel",
    "aten::clamp",
    "aten::fill_",
    "aten::full",
    "aten::log",
    "aten::sub",
    _COPY,
    # Torch serves few rows of many scores where there is top-k, top-p or logprobs.
    *by_torch("sample"),
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
        "qkv_rope_cache": (*_PRODUCT, *_EXPAND, "rope_cache_kernel", "lone_rope_cache_kernel"),
        "gate_up_act": (
            *_PRODUCT,
            *_EXPAND,
            "silu_and_mul_kernel",
            "adapted_silu_and_mul_kernel",
            "lone_silu_and_mul_kernel",
            "tiled_silu_and_mul_kernel",
        ),
        "row_parallel_linear": (*_PRODUCT, *_EXPAND, *_SUM, *_PARTS, _COPY),
        "row_parallel_add_norm": (
            *_PRODUCT,
            *_EXPAND,
            "rms_norm_kernel",
            "reduce_add_norm_kernel",
            *_SUM,
            *_PARTS,
            _COPY,
        ),
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
