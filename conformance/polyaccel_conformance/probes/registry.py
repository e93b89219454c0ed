"""The probe of every numeric operator and station."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from polyaccel_conformance.bench import Bench
from polyaccel_conformance.harness.probes import Measured
from polyaccel_conformance.probes import attention, collectives, experts, products, rows

Probe = Callable[[Bench, str, int], tuple[Measured, ...]]
"""Measures an operator on operands of a dtype; products as long as the third argument says where it has a choice.
Raises what the backend raises."""


def _all_of(*probes: Probe) -> Probe:
    return lambda bench, dtype, k: tuple(found for probe in probes for found in probe(bench, dtype, k))


PROBES: Mapping[str, Probe] = MappingProxyType(
    {
        "linear": products.linear,
        "rms_norm": rows.rms_norm,
        "layer_norm": rows.layer_norm,
        "rotary_embedding": rows.rotary_embedding,
        "silu_and_mul": rows.silu_and_mul,
        "gelu": rows.gelu,
        "paged_attention": attention.paged_attention,
        "dense_attention": attention.dense_attention,
        "moe_route": rows.moe_route,
        "moe_experts": experts.moe_experts,
        "sample": rows.sample,
        "embedding": products.embedding,
        "sgmv": products.sgmv,
        "sgmv_shrink": products.sgmv_shrink,
        "sgmv_expand": products.sgmv_expand,
        "column_linear": products.station("column_linear"),
        "qkv_rope_cache": products.station("qkv_rope_cache"),
        "gate_up_act": products.station("gate_up_act"),
        "row_parallel_linear": products.station("row_parallel_linear"),
        "row_parallel_add_norm": _all_of(products.station("row_parallel_add_norm"), rows.add_norm),
    }
)

RANKED_PROBES: Mapping[str, Probe] = MappingProxyType(
    {"all_reduce": collectives.all_reduce, "reduce_scatter": collectives.reduce_scatter}
)
"""Of sums over ranks: every rank takes part."""
