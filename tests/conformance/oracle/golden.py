"""What the oracle says of a golden: by the golden's names of what is expected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from polyaccel_conformance.formats import FORMATS
from polyaccel_conformance.multi.registry import ranked_set
from polyaccel_conformance.operand import Operand
from polyaccel_conformance.oracle.activation import gelu, silu_and_mul
from polyaccel_conformance.oracle.attention import attention
from polyaccel_conformance.oracle.bounded import Bounded
from polyaccel_conformance.oracle.gemm import linear
from polyaccel_conformance.oracle.lora import Adapter, Module, Triples, embedding, sgmv, sgmv_expand, sgmv_shrink
from polyaccel_conformance.oracle.moe import Projection as ExpertProjection
from polyaccel_conformance.oracle.moe import Routing, experts, route
from polyaccel_conformance.oracle.norm import layer_norm, rms_norm
from polyaccel_conformance.oracle.quantised import dequantize
from polyaccel_conformance.oracle.rotary import rotate
from polyaccel_conformance.oracle.sampling import Distribution, Row
from polyaccel_conformance.oracle.stations import Projection, add_norm, column_linear, gate_up_act, turned_heads
from polyaccel_conformance.problems.attention import causal
from polyaccel_conformance.problems.collectives import CollectiveProblem
from tests.conformance.multi.cases import ranked_case

Golden = Mapping[str, Any]
Floats = npt.NDArray[np.float64]

EXP_ULPS, DIVIDE_ULPS, RSQRT_ULPS, FUNCTION_ULPS = 2, 1, 2, 4


def array(golden: Golden, name: str) -> Floats:
    return np.array(golden[name], dtype=np.float64)


def adapters(golden: Golden) -> dict[int, Adapter]:
    def module(value: Golden | None) -> Module | None:
        return None if value is None else Module(a=array(value, "a"), b=array(value, "b"))

    return {int(slot): tuple(map(module, modules)) for slot, modules in golden.get("adapters", {}).items()}


def triples(golden: Golden) -> Triples:
    rows, slots = (np.array(golden.get(name, []), dtype=np.int64) for name in ("rows", "slots"))
    return Triples(rows=rows, slots=slots, mix=np.array(golden.get("mix", []), dtype=np.float64))


def projected(golden: Golden, dtype: str, addend: Floats | None = None) -> Bounded:
    projection = Projection(
        weight=array(golden, "w"),
        bias=array(golden, "bias") if "bias" in golden else None,
        adapters=adapters(golden),
        triples=triples(golden),
        starts=tuple(golden["starts"]),
    )
    return column_linear(array(golden, "x"), projection, FORMATS[dtype], addend=addend)


def attended(golden: Golden, dtype: str) -> Bounded:
    """Attention of one head."""
    q, k, v = (array(golden, name)[:, None] for name in ("q", "k", "v"))
    if golden["operator"] == "paged_attention":
        visible = causal(len(q), len(k), golden["window"])
    else:
        visible = causal(len(q), len(k), None) if golden["causal"] else np.ones((len(q), len(k)), dtype=np.bool_)
    ulps = {"exp_ulps": EXP_ULPS, "divide_ulps": DIVIDE_ULPS}
    return attention(q, k, v, visible, golden["scale"], p_format=FORMATS[dtype], **ulps)[:, 0]


def mixed(golden: Golden, dtype: str) -> Bounded:
    """Two experts without adapters."""
    gate_up, down = array(golden, "gate_up"), array(golden, "down")
    n = gate_up.shape[1] // 2
    return experts(
        array(golden, "x"),
        ExpertProjection(matrix=gate_up, bias=None, slices=(n, n)),
        ExpertProjection(matrix=down, bias=None, slices=(down.shape[1],)),
        np.array(golden["local"]),
        array(golden, "weights"),
        ((), ()),
        FORMATS[dtype],
    )


def row_of(golden: Golden) -> Row:
    """One row of logits and its request's parameters."""
    n = len(golden["logits"])
    counts = np.array(golden.get("counts", [0] * n))
    seen = counts > 0
    seen[np.array(golden.get("seen", []), dtype=np.int64)] = True
    numbers = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    return Row(
        logits=np.array(golden["logits"]),
        seen=seen,
        counts=counts,
        bias=np.array(golden.get("bias", [0.0] * n)),
        allowed=np.array(golden.get("allowed", [True] * n)),
        **{name: golden[name] for name in numbers if name in golden},
    )


def exchanged(golden: Golden, dtype: str) -> Bounded:
    """What a collective leaves on the golden's rank."""
    parts, rank = [array({"part": part}, "part") for part in golden["parts"]], golden["rank"]
    rows = len(parts[0]) // (len(parts) if golden["operator"] == "reduce_scatter" else 1)
    if golden["operator"] == "all_to_all":
        rows = 1
    named = {"dim": "attributes__dim", "counts": "structure__counts", "root": "attributes__source"}
    more = {axis: golden[name] for name, axis in named.items() if name in golden}
    sizes = {"dims__rows": rows, "dims__width": parts[0].shape[-1]}
    case = ranked_case(golden["operator"], len(parts), dtype=dtype, data="normal", **sizes, **more)
    problem = type(ranked_set(golden["operator"]).problem(case))(case, rank)  # type: ignore[call-arg]
    assert isinstance(problem, CollectiveProblem)
    problem.contributions = [Operand.rounded(part, dtype) for part in parts]
    wanted = problem.wanted()
    assert wanted is not None
    return wanted


def results(golden: Golden, dtype: str) -> dict[str, Bounded]:
    """What the oracle says, by the golden's names of what is expected."""
    kept = FORMATS[dtype]
    match golden["operator"]:
        case "rms_norm":
            s, weight = Bounded.exact(array(golden, "x")), array(golden, "weight")
            return {"expected": rms_norm(s, weight, golden["eps"], normed=kept, rsqrt_ulps=RSQRT_ULPS)}
        case "layer_norm":
            x, weight, shift = (array(golden, name) for name in ("x", "weight", "bias"))
            return {"expected": layer_norm(x, weight, shift, golden["eps"], rsqrt_ulps=RSQRT_ULPS)}
        case "rotary_embedding":
            x, cos, sin = (array(golden, name) for name in ("x", "cos", "sin"))
            return {"expected": rotate(x[:, None], cos, sin, golden["style"])[:, 0]}
        case "silu_and_mul":
            y = silu_and_mul(array(golden, "x"), kept=kept, exp_ulps=EXP_ULPS, divide_ulps=DIVIDE_ULPS)
            return {"expected": y}
        case "gelu":
            form, ulps = golden["approximate"], FUNCTION_ULPS
            return {"expected": gelu(array(golden, "x"), form, erf_ulps=ulps, tanh_ulps=ulps)}
        case "dense_attention" | "paged_attention":
            return {"expected": attended(golden, dtype)}
        case "moe_route":
            routed = route(array(golden, "logits")[None], None, Routing(**golden["routing"]))
            assert routed.ids[0].tolist() == golden["ids"]
            return {"expected": routed.weights}
        case "moe_experts":
            return {"expected": mixed(golden, dtype)}
        case "sample":
            return {"expected": Distribution(row_of(golden)).logprobs.reshape(1, -1)}
        case "all_reduce" | "reduce_scatter" | "all_gather" | "all_to_all" | "broadcast":
            return {"expected": exchanged(golden, dtype)}
        case "linear":
            bias = array(golden, "bias") if "bias" in golden else None
            return {"expected": linear(array(golden, "x"), array(golden, "w"), bias)}
        case "sgmv":
            y, starts = Bounded.exact(array(golden, "y")), tuple(golden["starts"])
            return {"expected": sgmv(y, array(golden, "x"), adapters(golden), triples(golden), starts, kept)[0]}
        case "sgmv_shrink":
            x, slices, largest = array(golden, "x"), golden["slices"], golden["largest"]
            return {"expected": sgmv_shrink(x, adapters(golden), triples(golden), slices, largest, kept)}
        case "sgmv_expand":
            y, starts = Bounded.exact(array(golden, "y")), tuple(golden["starts"])
            return {"expected": sgmv_expand(y, array(golden, "h"), adapters(golden), triples(golden), starts)[0]}
        case "embedding":
            ids = np.array(golden["ids"], dtype=np.int64)
            found = embedding(array(golden, "table"), ids, golden["start"], adapters(golden), triples(golden))
            return {"expected": found[0]}
        case "dequantize":
            codes, zeros = (np.array(golden[name], dtype=np.int64) for name in ("codes", "zeros"))
            values = dequantize(codes, zeros, array(golden, "scales"), golden["group_size"], FORMATS[golden["dtype"]])
            return {"expected": Bounded.exact(values)}
        case "column_linear" | "row_parallel_linear":
            return {"expected": projected(golden, dtype)}
        case "gate_up_act":
            y = projected(golden, dtype)
            return {"expected": gate_up_act(y, kept, kept, exp_ulps=EXP_ULPS, divide_ulps=DIVIDE_ULPS)}
        case "row_parallel_add_norm":
            residual = array(golden, "residual")
            weight, eps = array(golden, "norm_weight"), golden["eps"]
            y, joined = projected(golden, dtype), projected(golden, dtype, residual)
            normed, total = add_norm(y, joined, residual, weight, eps, kept, kept, RSQRT_ULPS)
            return {"expected": total, "normed": normed}
        case _:
            y = projected(golden, dtype)
            heads = y.reshape(y.shape[0], 1, y.shape[1])
            norm = (array(golden, "norm"), golden["eps"], kept, RSQRT_ULPS) if "norm" in golden else None
            cos, sin = array(golden, "cos"), array(golden, "sin")
            return {"expected": turned_heads(heads, cos, sin, golden["style"], kept, norm)}
