"""Products, adapters and stations give published and hand-computed results."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from polyaccel_conformance.formats import FORMATS
from polyaccel_conformance.oracle.bounded import Bounded
from polyaccel_conformance.oracle.gemm import linear
from polyaccel_conformance.oracle.lora import Adapter, Module, Triples, embedding, sgmv, sgmv_expand, sgmv_shrink
from polyaccel_conformance.oracle.quantised import dequantize
from polyaccel_conformance.oracle.stations import Projection, add_norm, column_linear, gate_up_act, turned_heads

Golden = Mapping[str, Any]
Floats = npt.NDArray[np.float64]

GOLDENS = json.loads((Path(__file__).parents[1] / "goldens" / "products.json").read_text())
EXP_ULPS, DIVIDE_ULPS, RSQRT_ULPS = 2, 1, 2


def array(golden: Golden, name: str) -> Floats:
    return np.array(golden[name], dtype=np.float64)


def adapters(golden: Golden) -> dict[int, Adapter]:
    def module(value: Golden | None) -> Module | None:
        return None if value is None else Module(a=array(value, "a"), b=array(value, "b"))

    return {int(slot): tuple(map(module, modules)) for slot, modules in golden.get("adapters", {}).items()}


def triples(golden: Golden) -> Triples:
    rows, slots = (np.array(golden.get(name, []), dtype=np.int64) for name in ("rows", "slots"))
    return Triples(rows=rows, slots=slots, mix=np.array(golden.get("mix", []), dtype=np.float64))


def projected(golden: Golden, dtype: str) -> Bounded:
    projection = Projection(
        weight=array(golden, "w"),
        bias=array(golden, "bias") if "bias" in golden else None,
        adapters=adapters(golden),
        triples=triples(golden),
        starts=tuple(golden["starts"]),
    )
    return column_linear(array(golden, "x"), projection, FORMATS[dtype])


def results(golden: Golden, dtype: str) -> dict[str, Bounded]:
    """What the oracle says, by the golden's names of what is expected."""
    kept = FORMATS[dtype]
    match golden["operator"]:
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
            base, residual = array(golden, "x") @ array(golden, "w").T, array(golden, "residual")
            weight, eps = array(golden, "norm_weight"), golden["eps"]
            y = projected(golden, dtype)
            normed, total = add_norm(y, base, residual, weight, eps, kept, kept, RSQRT_ULPS)
            return {"expected": total, "normed": normed}
        case _:
            y = projected(golden, dtype)
            heads = y.reshape(y.shape[0], 1, y.shape[1])
            norm = (array(golden, "norm"), golden["eps"], kept, RSQRT_ULPS) if "norm" in golden else None
            cos, sin = array(golden, "cos"), array(golden, "sin")
            return {"expected": turned_heads(heads, cos, sin, golden["style"], kept, norm)}


@pytest.mark.parametrize("golden", GOLDENS, ids=lambda golden: f"{golden['operator']}: {golden['name']}")
@pytest.mark.parametrize("dtype", FORMATS)
def test_published_and_hand_computed_results(golden: Golden, dtype: str) -> None:
    for name, found in results(golden, dtype).items():
        np.testing.assert_allclose(found.value, array(golden, name), rtol=1e-14, atol=1e-14)
        assert np.all(found.bound >= 0)
        assert np.all(np.isfinite(found.bound))


def test_every_operator_has_three_with_a_named_source() -> None:
    counts = Counter(golden["operator"] for golden in GOLDENS if golden["source"])
    assert set(counts) == {
        *("linear", "sgmv", "sgmv_shrink", "sgmv_expand", "embedding", "dequantize"),
        *("column_linear", "row_parallel_linear", "gate_up_act", "row_parallel_add_norm", "qkv_rope_cache"),
    }
    assert min(counts.values()) >= 3
