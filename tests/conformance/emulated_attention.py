"""Implementations of attention, emulated on the host operands of a problem."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import numpy.typing as npt

from polyaccel_conformance.formats import FORMATS, Format
from polyaccel_conformance.problem import Problem
from polyaccel_conformance.problems.attention import AttentionProblem, DenseAttentionProblem
from tests.conformance.drawn import Emulation, operand
from tests.conformance.emulation import LEGITIMATE, f32, rounding, sum_terms

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Round = Callable[[npt.ArrayLike], Floats]

LOG2E = f32(math.log2(math.e))


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
        assert isinstance(problem, AttentionProblem)
        q = operand(problem, "q")
        out = np.zeros(q.shape)
        group = problem.data.heads // problem.data.kv_heads
        kept = FORMATS[problem.case.dtype] if self.p == "v" else FORMATS[self.p]
        begin = problem.starts[0] if isinstance(problem, DenseAttentionProblem) else 0
        for keys, visible in zip(problem.sequences, problem.visible, strict=True):
            end = begin + len(visible)
            for head in range(q.shape[1] if end > begin else 0):
                own = (q[begin:end, head], keys.k[:, head // group], keys.v[:, head // group])
                found = self._head(*own, visible, problem.scale, kept)
                out[begin:end, head] = np.where(visible.any(axis=1, keepdims=True), found, 0.0)
            begin = end
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
