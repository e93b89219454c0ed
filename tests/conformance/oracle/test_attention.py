"""The bound of attention holds for every legitimate implementation, and for no coarser one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from polyaccel_conformance.formats import FORMATS, Format
from polyaccel_conformance.oracle.attention import attention
from polyaccel_conformance.oracle.bounded import finish
from polyaccel_conformance.problem import Problem
from polyaccel_conformance.problems.attention import DenseAttentionProblem, DenseAttentionProblems
from tests.conformance.drawn import Emulation, operand, problems, survey
from tests.conformance.emulation import BF16, F16, F32, LEGITIMATE, f32, rounding, sum_terms, tf32

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Round = Callable[[npt.ArrayLike], Floats]

GOLDENS = json.loads((Path(__file__).parents[1] / "goldens" / "attention.json").read_text())
LOG2E = f32(math.log2(math.e))
SMALL = {
    "dims__tokens": (1, 2, 16, 17, 33),
    "dims__kv_heads": (1, 2),
    "dims__group": (1, 2),
    "dims__head_dim": (11, 33, 64),
}


class Emulated:
    """One implementation: how it sums, in which tiles, with which exponential and in which format P is kept."""

    def __init__(
        self,
        how: str,
        tiles: str = "all",
        *,
        p: str = "float32",
        base2: bool = False,
        scaled_q: bool = False,
        ulps: int = 0,
        operands: Round = f32,
        scores: Round = f32,
        weights: Round = f32,
        sums: Round = f32,
    ) -> None:
        self.how, self.tiles, self.p, self.base2, self.scaled_q, self.ulps = how, tiles, p, base2, scaled_q, ulps
        self.operands, self.scores, self.weights, self.sums = operands, scores, weights, sums

    def __call__(self, problem: Problem) -> Mapping[str, Floats]:
        assert isinstance(problem, DenseAttentionProblem)
        q, k, v = (operand(problem, name) for name in ("q", "k", "v"))
        out = np.zeros(q.shape)
        group = problem.data.heads // problem.data.kv_heads
        kept = FORMATS[problem.case.dtype] if self.p == "v" else FORMATS[self.p]
        for begin, visible in zip(problem.starts, problem.visible, strict=False):
            end = begin + len(visible)
            for head in range(q.shape[1] if end > begin else 0):
                own = (q[begin:end, head], k[begin:end, head // group], v[begin:end, head // group])
                out[begin:end, head] = self._head(*own, visible, problem.scale, kept)
        return {"out": out}

    def _head(self, q: Floats, k: Floats, v: Floats, visible: Mask, scale: float, kept: Format) -> Floats:
        q, k, scale = self.operands(q), self.operands(k), float(f32(scale))
        if self.scaled_q:
            s = sum_terms(f32(q * scale)[:, :, None] * k.T[None], self.how)
        else:
            s = f32(sum_terms(q[:, :, None] * k.T[None], self.how) * scale)
        s = np.where(visible, self.scores(s), -np.inf)
        if self.tiles == "split":
            return self._merge([self._tile(s[:, a:b], v[a:b], kept) for a, b in _parts(len(k))])
        if self.tiles == "running":
            return self._running(s, v, kept)
        top, weight, total = self._tile(s, v, kept)
        if self.tiles == "normalised":
            p = rounding(kept)(f32(self._exp(s, top) / weight))
            return sum_terms(p[:, :, None] * v[None], self.how)
        return f32(total / weight)

    def _exp(self, s: Floats, top: Floats) -> Floats:
        exact = np.exp2(f32(f32(s * LOG2E) - f32(top * LOG2E))) if self.base2 else np.exp(f32(s - top))
        off = self.ulps * 2.0**-24 * np.where(exact == 1, 0, exact)
        return self.weights(f32(exact + off))

    def _tile(self, s: Floats, v: Floats, kept: Format, floor: float | Floats = -1e30) -> tuple[Floats, Floats, Floats]:
        top = np.maximum(s.max(axis=1, keepdims=True), floor)
        p = self._exp(s, top)
        weight = self.sums(sum_terms(p, self.how if self.sums is f32 else "bfloat16 accumulator"))[:, None]
        return top, weight, sum_terms(rounding(kept)(p)[:, :, None] * v[None], self.how)

    def _running(self, s: Floats, v: Floats, kept: Format) -> Floats:
        top = np.full((len(s), 1), -1e30)
        weight, total = np.zeros((len(s), 1)), np.zeros((len(s), v.shape[1]))
        for a in range(0, s.shape[1], 16):
            higher, part, summed = self._tile(s[:, a : a + 16], v[a : a + 16], kept, top)
            fade = self._exp(top, higher)
            weight, total = f32(f32(weight * fade) + part), f32(f32(total * fade) + summed)
            top = higher
        return f32(total / weight)

    def _merge(self, parts: list[tuple[Floats, Floats, Floats]]) -> Floats:
        highest = np.max([top for top, _, _ in parts], axis=0)
        weight, total = np.zeros_like(highest), np.zeros_like(parts[0][2])
        for top, part, summed in parts:
            fade = self._exp(top, highest)
            weight, total = f32(weight + f32(part * fade)), f32(total + f32(summed * fade))
        return f32(total * f32(1 / weight))


def _parts(n: int) -> Iterator[tuple[int, int]]:
    size = max(-(-n // 3), 1)
    return ((a, min(a + size, n)) for a in range(0, n, size))


ACCUMULATIONS: Mapping[str, Emulation] = {how: Emulated(how) for how in LEGITIMATE}
FORMS: Mapping[str, Emulation] = {
    "running softmax": Emulated("sequential", "running"),
    "running softmax, truncating, P in v's dtype": Emulated("chunk16 truncating", "running", p="v"),
    "running softmax, base 2": Emulated("pairwise", "running", base2=True),
    "split keys": Emulated("pairwise", "split", base2=True),
    "split keys, P in v's dtype": Emulated("chunk16 aligned", "split", p="v"),
    "P normalised, in v's dtype": Emulated("sequential", "normalised", p="v"),
    "scaled q": Emulated("sequential", scaled_q=True, p="v"),
    "2 ulp high": Emulated("chunk16 truncating", "running", ulps=2),
    "2 ulp low": Emulated("split-K", "split", ulps=-2, p="v"),
}


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("count", [35, pytest.param(3400, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_no_legitimate_implementation_is_over_and_the_worst_is_near(dtype: str, count: int) -> None:
    kinds = tuple(kind for kind in DenseAttentionProblems().axes()["data"] if kind != "selection")
    drawn = problems(DenseAttentionProblems(), count, seed=41, dtype=(dtype,), data=kinds, **SMALL)
    ratios = survey({**ACCUMULATIONS, **FORMS}, drawn)
    assert {name: ratio for name, ratio in ratios.items() if ratio > 1} == {}
    assert max(ratios.values()) >= 0.1


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("count", [10, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_every_legitimate_implementation_selects_bit_by_bit(dtype: str, count: int) -> None:
    drawn = problems(DenseAttentionProblems(), count, seed=43, dtype=(dtype,), data=("selection",), **SMALL)
    ratios = survey({**ACCUMULATIONS, **FORMS}, drawn)
    assert {name: ratio for name, ratio in ratios.items() if ratio > 0} == {}


@pytest.mark.parametrize(
    ("dtype", "kind", "lower"),
    [
        ("float32", "normal", Emulated("pairwise", operands=tf32)),
        ("float32", "normal", Emulated("pairwise", p="bfloat16")),
        ("float32", "normal", Emulated("pairwise", p="float16")),
        ("float32", "normal", Emulated("pairwise", scores=F16.round)),
        ("float32", "normal", Emulated("pairwise", weights=BF16.round)),
        ("bfloat16", "peaked", Emulated("pairwise", scores=BF16.round)),
        ("float16", "peaked", Emulated("pairwise", scores=F16.round)),
        ("bfloat16", "peaked", Emulated("bfloat16 accumulator")),
        ("float16", "peaked", Emulated("float16 accumulator")),
        ("bfloat16", "positive", Emulated("pairwise", sums=BF16.round)),
    ],
    ids=[
        "TF32 scores",
        "P of 8 bits for float32",
        "P of 11 bits for float32",
        "float16 scores for float32",
        "exp of 8 bits for float32",
        "bfloat16 scores",
        "float16 scores",
        "bfloat16 accumulators",
        "float16 accumulators",
        "bfloat16 sum of weights",
    ],
)
def test_arithmetic_one_class_lower_is_over_on_random_data(dtype: str, kind: str, lower: Emulation) -> None:
    where = {"dims__kv_heads": (1,), "dims__group": (1,), "attributes__starts": ("one",), "attributes__scale": (0.3,)}
    tokens = (130,) if kind == "positive" else (65,)
    sizes = {"dims__tokens": tokens, "dims__head_dim": (64,), "attributes__causal": (False,)}
    drawn = problems(DenseAttentionProblems(), 2, seed=7, dtype=(dtype,), data=(kind,), **where, **sizes)
    assert survey({"lower": lower}, drawn)["lower"] > 1


@pytest.mark.parametrize("golden", GOLDENS, ids=lambda golden: golden["name"])
@pytest.mark.parametrize("dtype", FORMATS)
def test_hand_computed_results(golden: Mapping[str, list[list[float]]], dtype: str) -> None:
    q, k, v, wanted = (np.array(golden[name])[:, None] for name in ("q", "k", "v", "expected"))
    visible = np.array(golden["visible"], dtype=np.bool_)
    scale = float(golden["scale"])  # type: ignore[arg-type]
    out = attention(q, k, v, visible, scale, p_format=FORMATS[dtype], exp_ulps=2, divide_ulps=1)
    np.testing.assert_allclose(out.value, wanted, rtol=1e-14, atol=1e-15)
    assert np.all(finish(out, FORMATS[dtype]).tolerance >= np.abs(FORMATS[dtype].round(wanted) - wanted))


def test_query_heads_share_key_heads_in_order() -> None:
    v = np.array([[[1.0], [2.0]]])
    out = attention(
        np.ones((1, 6, 1)),
        np.ones((1, 2, 1)),
        v,
        np.ones((1, 1), dtype=np.bool_),
        1.0,
        p_format=F32,
        exp_ulps=2,
        divide_ulps=1,
    )
    assert out.value[0, :, 0].tolist() == [1, 1, 1, 2, 2, 2]


def test_the_terms_sum_to_the_bound() -> None:
    problem = next(problems(DenseAttentionProblems(), 1, seed=3, dtype=("bfloat16",), data=("normal",), **SMALL))
    expected = problem.expected()["out"]
    total = sum(np.broadcast_to(term, expected.tolerance.shape) for _, term in expected.terms)  # type: ignore[union-attr]
    np.testing.assert_allclose(expected.tolerance, total, rtol=0.02)  # type: ignore[union-attr]
