"""Writes goldens/high_precision.json: every numeric operator by its formula, with 50 digits, in plain loops.

    python -m tests.conformance.oracle.make_goldens

Uses mpmath and nothing of this suite, so that an error of the oracle cannot be in both. Inputs are short binary
fractions; results have 17 digits.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mpmath  # type: ignore[import-untyped]
from mpmath import mp, mpf

Golden = dict[str, Any]
Vector = Sequence[Any]
Matrix = Sequence[Vector]

FILE = Path(__file__).parents[1] / "goldens" / "high_precision.json"
DIGITS = 50
EACH = 3

mp.dps = DIGITS


class Draw:
    """Short binary fractions."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def number(self, low: float = -2.0, high: float = 2.0) -> float:
        return self._random.randint(int(low * 64), int(high * 64)) / 64

    def vector(self, n: int, low: float = -2.0, high: float = 2.0) -> list[float]:
        return [self.number(low, high) for _ in range(n)]

    def matrix(self, rows: int, columns: int, low: float = -2.0, high: float = 2.0) -> list[list[float]]:
        return [self.vector(columns, low, high) for _ in range(rows)]

    def angles(self, tokens: int, count: int) -> tuple[list[list[float]], list[list[float]]]:
        """Cosines and sines that are short: of rational points of the unit circle, rounded to 2^-12."""
        cos, sin = [], []
        for _ in range(tokens):
            turns = [self.number(-1, 1) for _ in range(count)]
            cos.append([round((1 - t * t) / (1 + t * t) * 4096) / 4096 for t in turns])
            sin.append([round(2 * t / (1 + t * t) * 4096) / 4096 for t in turns])
        return cos, sin


# -- formulas ----------------------------------------------------------------------------------------------------------


def dot(a: Vector, b: Vector) -> Any:
    return sum((mpf(x) * mpf(y) for x, y in zip(a, b, strict=True)), mpf(0))


def product(x: Matrix, w: Matrix, bias: Vector | None = None) -> list[list[Any]]:
    """x W^T + bias."""
    shift = [0.0] * len(w) if bias is None else bias
    return [[dot(row, column) + mpf(c) for column, c in zip(w, shift, strict=True)] for row in x]


def rms_norm(x: Vector, weight: Vector, eps: float) -> list[Any]:
    root = mpmath.sqrt(dot(x, x) / len(x) + mpf(eps))
    return [mpf(v) / root * mpf(w) for v, w in zip(x, weight, strict=True)]


def layer_norm(x: Vector, weight: Vector, bias: Vector, eps: float) -> list[Any]:
    mean = sum(map(mpf, x)) / len(x)
    centred = [mpf(v) - mean for v in x]
    root = mpmath.sqrt(dot(centred, centred) / len(x) + mpf(eps))
    return [v / root * mpf(w) + mpf(b) for v, w, b in zip(centred, weight, bias, strict=True)]


def silu(x: Any) -> Any:
    return mpf(x) / (1 + mpmath.exp(-mpf(x)))


def gelu(x: float, approximate: str) -> Any:
    v = mpf(x)
    if approximate == "none":
        return v / 2 * (1 + mpmath.erf(v / mpmath.sqrt(2)))
    return v / 2 * (1 + mpmath.tanh(mpmath.sqrt(2 / mpmath.pi) * (v + mpf("0.044715") * v**3)))


def rotated(x: Vector, cos: Vector, sin: Vector, style: str) -> list[Any]:
    """One head."""
    n, y = len(cos), [mpf(v) for v in x]
    for i, (c, s) in enumerate(zip(cos, sin, strict=True)):
        a, b = (i, i + n) if style == "half" else (2 * i, 2 * i + 1)
        u, v = mpf(x[a]), mpf(x[b])
        y[a], y[b] = u * mpf(c) - v * mpf(s), v * mpf(c) + u * mpf(s)
    return y


def softmax(x: Vector) -> list[Any]:
    mass = [mpmath.exp(mpf(v)) for v in x]
    return [m / sum(mass) for m in mass]


def attention(q: Vector, k: Matrix, v: Matrix, scale: float) -> list[Any]:
    """One query that sees all of k."""
    if not k:
        return [mpf(0)] * len(q)
    weights = softmax([mpf(scale) * dot(q, key) for key in k])
    return [sum(w * mpf(value[c]) for w, value in zip(weights, v, strict=True)) for c in range(len(v[0]))]


def adapted(y: list[list[Any]], x: Matrix, golden: Golden) -> list[list[Any]]:
    """y with the delta of every triple."""
    for row, slot, mix in zip(golden["rows"], golden["slots"], golden["mix"], strict=True):
        for begin, module in zip(golden["starts"], golden["adapters"][str(slot)], strict=False):
            if module is None:
                continue
            h = [dot(x[row], a) for a in module["a"]]
            for i, b in enumerate(module["b"]):
                y[row][begin + i] += mpf(mix) * dot(h, b)
    return y


# -- goldens -----------------------------------------------------------------------------------------------------------


def linear(d: Draw, i: int) -> Golden:
    found: Golden = {"x": d.matrix(2, 5 + i), "w": d.matrix(3, 5 + i), "bias": d.vector(3)}
    return {**found, "expected": product(found["x"], found["w"], found["bias"])}


def _rms(d: Draw, i: int) -> Golden:
    found: Golden = {"x": d.matrix(2, 4 + i), "weight": d.vector(4 + i), "eps": 2.0**-17}
    return {**found, "expected": [rms_norm(row, found["weight"], found["eps"]) for row in found["x"]]}


def _layer(d: Draw, i: int) -> Golden:
    found: Golden = {"x": d.matrix(2, 4 + i), "weight": d.vector(4 + i), "bias": d.vector(4 + i), "eps": 2.0**-17}
    rows = [layer_norm(row, found["weight"], found["bias"], found["eps"]) for row in found["x"]]
    return {**found, "expected": rows}


def _silu(d: Draw, i: int) -> Golden:
    x = d.matrix(2, 8, -6.0, 6.0)
    return {"x": x, "expected": [[silu(row[j]) * mpf(row[j + 4]) for j in range(4)] for row in x]}


def _gelu(d: Draw, i: int) -> Golden:
    approximate = ("none", "tanh")[i % 2]
    x = d.matrix(2, 4, -4.0, 4.0)
    return {"x": x, "approximate": approximate, "expected": [[gelu(v, approximate) for v in row] for row in x]}


def _rotary(d: Draw, i: int) -> Golden:
    style = ("half", "interleaved")[i % 2]
    cos, sin = d.angles(2, 2)
    x = d.matrix(2, 5)
    rows = [rotated(row, c, s, style) for row, c, s in zip(x, cos, sin, strict=True)]
    return {"x": x, "cos": cos, "sin": sin, "style": style, "expected": rows}


def dense_attention(d: Draw, i: int) -> Golden:
    q, k, v, causal = d.matrix(4, 3), d.matrix(4, 3), d.matrix(4, 3), i % 2 == 0
    scale = 0.5
    rows = [attention(one, k[: j + 1] if causal else k, v[: j + 1] if causal else v, scale) for j, one in enumerate(q)]
    return {"q": q, "k": k, "v": v, "causal": causal, "scale": scale, "expected": rows}


def paged_attention(d: Draw, i: int) -> Golden:
    """The last two queries of a context of five; query j sees keys j - window < i <= j."""
    window = (None, 2, 3)[i % 3]
    q, k, v, scale = d.matrix(2, 3), d.matrix(5, 3), d.matrix(5, 3), 0.25
    rows = []
    for j, one in enumerate(q):
        at = 3 + j
        first = 0 if window is None else max(at - window + 1, 0)
        rows.append(attention(one, k[first : at + 1], v[first : at + 1], scale))
    return {"q": q, "k": k, "v": v, "window": window, "scale": scale, "expected": rows}


def moe_route(d: Draw, i: int) -> Golden:
    scoring = ("softmax_topk", "topk_softmax", "sigmoid")[i % 3]
    logits = [0.25 * j + d.number(0, 0.125) for j in random.Random(i).sample(range(-6, 6), 6)]
    order = sorted(range(6), key=lambda j: -logits[j])[:2]
    if scoring == "softmax_topk":
        weights = [softmax(logits)[j] for j in order]
    elif scoring == "topk_softmax":
        weights = softmax([logits[j] for j in order])
    else:
        weights = [1 / (1 + mpmath.exp(-mpf(logits[j]))) for j in order]
    if i % 2:
        weights = [w / sum(weights) for w in weights]
    routing = {"top_k": 2, "scoring": scoring, "renormalise": bool(i % 2), "scale": 2.5}
    return {"logits": logits, "routing": routing, "ids": order, "expected": [[w * mpf(2.5) for w in weights]]}


def moe_experts(d: Draw, i: int) -> Golden:
    x, up, down = d.matrix(2, 3), [d.matrix(4, 3) for _ in range(2)], [d.matrix(3, 2) for _ in range(2)]
    local, weights = [[0, 1], [1, -1]], d.matrix(2, 2, 0.0, 1.0)
    rows = []
    for token, row in enumerate(x):
        y = [mpf(0)] * 3
        for expert, weight in zip(local[token], weights[token], strict=True):
            if expert < 0:
                continue
            both = product([row], up[expert])[0]
            act = [silu(both[j]) * both[j + 2] for j in range(2)]
            y = [a + mpf(weight) * b for a, b in zip(y, product([act], down[expert])[0], strict=True)]
        rows.append(y)
    return {"x": x, "gate_up": up, "down": down, "local": local, "weights": weights, "expected": rows}


def sample(d: Draw, i: int) -> Golden:
    logits = d.vector(7, -4.0, 4.0)
    return {"logits": logits, "expected": [[mpmath.log(p) for p in softmax(logits)]]}


def _adapters(d: Draw, k: int, n: Sequence[int]) -> Golden:
    """Two slots of ranks 1 and 3; the second does not touch the last slice where there are several."""
    modules = {
        str(slot): [
            None if slot == 4 and len(n) > 1 and j == len(n) - 1 else {"a": d.matrix(rank, k), "b": d.matrix(m, rank)}
            for j, m in enumerate(n)
        ]
        for slot, rank in ((1, 1), (4, 3))
    }
    starts = [sum(n[:j]) for j in range(len(n) + 1)]
    return {"adapters": modules, "starts": starts, "rows": [0, 0, 1], "slots": [1, 4, 4], "mix": [1.0, 0.5, -1.25]}


def sgmv(d: Draw, i: int) -> Golden:
    y, x = d.matrix(3, 5), d.matrix(3, 4)
    found = _adapters(d, 4, (2, 3) if i else (5,))
    expected = adapted([[mpf(v) for v in row] for row in y], x, found)
    return {"y": y, "x": x, **found, "expected": expected}


def sgmv_shrink(d: Draw, i: int) -> Golden:
    x, found = d.matrix(2, 4 + i), _adapters(d, 4 + i, (3,))
    rows = []
    for row, slot in zip(found["rows"], found["slots"], strict=True):
        h = [dot(x[row], a) for a in found["adapters"][str(slot)][0]["a"]]
        rows.append([h + [mpf(0)] * (3 - len(h))])
    return {"x": x, **found, "slices": 1, "largest": 3, "expected": rows}


def sgmv_expand(d: Draw, i: int) -> Golden:
    y, found, h = d.matrix(2, 3), _adapters(d, 4, (3,)), [[row] for row in d.matrix(3, 3)]
    expected = [[mpf(v) for v in row] for row in y]
    for j, (row, slot, mix) in enumerate(zip(found["rows"], found["slots"], found["mix"], strict=True)):
        for c, b in enumerate(found["adapters"][str(slot)][0]["b"]):
            expected[row][c] += mpf(mix) * dot(h[j][0][: len(b)], b)
    return {"y": y, "h": h, **found, "expected": expected}


def embedding(d: Draw, i: int) -> Golden:
    table, start, ids = d.matrix(4, 3), 10, [11, 13]
    found = _adapters(d, 4, (3,))
    expected = [[mpf(v) for v in table[token - start]] for token in ids]
    for row, slot, mix in zip(found["rows"], found["slots"], found["mix"], strict=True):
        module = found["adapters"][str(slot)][0]
        h = [a[ids[row] - start] for a in module["a"]]
        for c, b in enumerate(module["b"]):
            expected[row][c] += mpf(mix) * dot(h, b)
    return {"table": table, "start": start, "ids": ids, **found, "expected": expected}


def _projected(d: Draw, n: Sequence[int]) -> tuple[Golden, list[list[Any]]]:
    found: Golden = {"x": d.matrix(2, 4), "w": d.matrix(sum(n), 4), "bias": d.vector(sum(n)), **_adapters(d, 4, n)}
    return found, adapted(product(found["x"], found["w"], found["bias"]), found["x"], found)


def column_linear(d: Draw, i: int) -> Golden:
    found, y = _projected(d, (2, 3))
    return {**found, "expected": y}


def row_parallel_linear(d: Draw, i: int) -> Golden:
    found, y = _projected(d, (4,))
    return {**found, "expected": y}


def gate_up_act(d: Draw, i: int) -> Golden:
    found, y = _projected(d, (3, 3))
    return {**found, "expected": [[silu(row[j]) * row[j + 3] for j in range(3)] for row in y]}


def row_parallel_add_norm(d: Draw, i: int) -> Golden:
    found, y = _projected(d, (4,))
    residual, weight, eps = d.matrix(2, 4), d.vector(4), 2.0**-17
    total = [[a + mpf(b) for a, b in zip(u, v, strict=True)] for u, v in zip(y, residual, strict=True)]
    normed = [rms_norm(row, weight, eps) for row in total]
    more: Golden = {"residual": residual, "norm_weight": weight, "eps": eps}
    return {**found, **more, "expected": total, "normed": normed}


def qkv_rope_cache(d: Draw, i: int) -> Golden:
    """One head: what happens to a head of q or k."""
    found, y = _projected(d, (4,))
    cos, sin = d.angles(2, 2)
    norm, eps, style = d.vector(4), 2.0**-17, ("half", "interleaved")[i % 2]
    rows = [rms_norm(row, norm, eps) for row in y]
    turned = [[rotated(row, c, s, style)] for row, c, s in zip(rows, cos, sin, strict=True)]
    return {**found, "cos": cos, "sin": sin, "norm": norm, "eps": eps, "style": style, "expected": turned}


MAKERS: dict[str, Callable[[Draw, int], Golden]] = {
    "linear": linear,
    "rms_norm": _rms,
    "layer_norm": _layer,
    "rotary_embedding": _rotary,
    "silu_and_mul": _silu,
    "gelu": _gelu,
    "dense_attention": dense_attention,
    "paged_attention": paged_attention,
    "moe_route": moe_route,
    "moe_experts": moe_experts,
    "sample": sample,
    "embedding": embedding,
    "sgmv": sgmv,
    "sgmv_shrink": sgmv_shrink,
    "sgmv_expand": sgmv_expand,
    "column_linear": column_linear,
    "row_parallel_linear": row_parallel_linear,
    "gate_up_act": gate_up_act,
    "row_parallel_add_norm": row_parallel_add_norm,
    "qkv_rope_cache": qkv_rope_cache,
}


def goldens() -> Iterator[Golden]:
    """Three of each operator."""
    for place, (operator, make) in enumerate(MAKERS.items()):
        for i in range(EACH):
            found = make(Draw(100 * place + i), i)
            name = f"{DIGITS} digits, {i}"
            yield {"operator": operator, "name": name, "source": f"mpmath, {DIGITS} digits", **_plain(found)}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return float(mpmath.nstr(value, 17)) if isinstance(value, mpf) else value


def main() -> None:
    FILE.write_text("[\n" + ",\n".join(json.dumps(golden) for golden in goldens()) + "\n]\n")


if __name__ == "__main__":
    main()
