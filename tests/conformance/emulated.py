"""Implementations of products, adapters and stations, emulated on the host operands of a problem."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from polyaccel_conformance.formats import FORMATS
from polyaccel_conformance.oracle.lora import Adapter, Triples
from polyaccel_conformance.problem import Problem
from polyaccel_conformance.problems.embedding import EmbeddingProblem
from polyaccel_conformance.problems.linear import LinearProblem
from polyaccel_conformance.problems.sgmv import ExpandProblem, LoraProblem, SgmvProblem, ShrinkProblem
from polyaccel_conformance.problems.stations import StationProblem
from polyaccel_conformance.problems.stations_norm import RowParallelAddNormProblem
from polyaccel_conformance.problems.stations_qkv import QkvRopeCacheProblem
from tests.conformance.drawn import operand
from tests.conformance.emulated_rotary import turned
from tests.conformance.emulation import f32, rounding, sum_terms

Floats = npt.NDArray[np.float64]
Round = Callable[[npt.ArrayLike], Floats]


def _same(x: npt.ArrayLike) -> Floats:
    return np.asarray(x, dtype=np.float64)


@dataclass(frozen=True, kw_only=True)
class Form:
    """How an implementation computes.

    Attributes:
        how: accumulation, of :mod:`tests.conformance.emulation`.
        first: bias and y are where the accumulator starts.
        inputs: what the multiplier does to its operands.
        h: format in which h is kept, ``"x"`` for x's dtype.
        mix: whether the mix weight multiplies h or the delta.
        parts: results are rounded between a station's parts.
        residual: whether it is added last, to the product without deltas, to the deltas, or is where the
            accumulator of the product starts.
    """

    how: str
    first: bool = False
    inputs: Round = _same
    h: str = "float32"
    mix: str = "h"
    parts: bool = False
    residual: Literal["last", "product", "deltas", "start"] = "last"


LEGITIMATE: Mapping[str, Form] = {
    "sequential": Form(how="sequential"),
    "sequential from y": Form(how="sequential", first=True, residual="start"),
    "pairwise": Form(how="pairwise", h="x"),
    "pairwise, parts": Form(how="pairwise", h="x", parts=True),
    "chunk16 truncating": Form(how="chunk16 truncating", h="x", mix="delta", parts=True),
    "chunk16 truncating from y": Form(how="chunk16 truncating", first=True, parts=True),
    "chunk16 aligned": Form(how="chunk16 aligned", first=True, h="x"),
    "split-K": Form(how="split-K", mix="delta", residual="deltas"),
    "split-K, parts": Form(how="split-K", h="x", parts=True, residual="product"),
    "fused multiply-add": Form(how="fused multiply-add", first=True, h="x", parts=True, residual="deltas"),
}
"""Every accumulation, with every permitted intermediate format and place of a rounding."""


def product(x: Floats, w: Floats, bias: Floats | None, form: Form) -> Floats:
    """``[T, n]`` before it is stored."""
    left, right = form.inputs(x), form.inputs(w)
    terms = left[:, :, None] * right.T[None]
    if bias is None:
        return sum_terms(terms, form.how)
    start = np.broadcast_to(bias, (len(x), w.shape[0]))[:, None]
    if form.first:
        return sum_terms(np.concatenate([start, terms], axis=1), form.how)
    return f32(sum_terms(terms, form.how) + bias)


def deltas(
    y: Floats,
    x: Floats | None,
    adapters: Mapping[int, Adapter],
    triples: Triples,
    starts: tuple[int, ...],
    form: Form,
    dtype: str,
    h_of: Callable[[npt.NDArray[np.int64], int, int], Floats] | None = None,
) -> Floats:
    """y with every delta, before it is stored. ``h_of``: h of some triples, a slice and a rank, where it is given."""
    kept = rounding(FORMATS[dtype if form.h == "x" else form.h])
    y = y.copy()
    for slot, members in triples.segments():
        rows, mix = triples.rows[members], triples.mix[members][:, None]
        for i, (begin, module) in enumerate(zip(starts, adapters.get(slot, ()), strict=False)):
            if module is None:
                continue
            if h_of is None:
                assert x is not None
                h = kept(sum_terms(form.inputs(x[rows])[:, :, None] * form.inputs(module.a).T[None], form.how))
            else:
                h = h_of(members, i, module.rank)
            if form.mix == "h":
                h = f32(h * mix)
            columns = slice(begin, begin + module.b.shape[0])
            terms = form.inputs(h)[:, :, None] * form.inputs(module.b).T[None]
            if form.first and form.mix == "h":
                start = y[rows][:, None, columns]
                y[rows, columns] = sum_terms(np.concatenate([start, terms], axis=1), form.how)
                continue
            delta = sum_terms(terms, form.how)
            y[rows, columns] = f32(y[rows, columns] + (f32(delta * mix) if form.mix == "delta" else delta))
    return y


# -- operators ---------------------------------------------------------------------------------------------------------


def linear(problem: Problem, form: Form) -> Mapping[str, Floats]:
    assert isinstance(problem, LinearProblem)
    bias = problem.weight.bias
    w = problem.weight.matrix.values.astype(np.float64)
    return {"y": product(operand(problem, "x"), w, None if bias is None else bias.values.astype(np.float64), form)}


def sgmv(problem: Problem, form: Form) -> Mapping[str, Floats]:
    assert isinstance(problem, SgmvProblem)
    y = deltas(operand(problem, "y"), operand(problem, "x"), *_adapters(problem), form, problem.case.dtype)
    return {"y": y, "returned": y}


def shrink(problem: Problem, form: Form) -> Mapping[str, Floats]:
    assert isinstance(problem, ShrinkProblem)
    (expected,) = problem.expected().values()
    h = np.zeros(expected.value.shape)  # type: ignore[union-attr]
    kept = rounding(FORMATS[problem.case.dtype if form.h == "x" else form.h])
    adapters, triples, _ = _adapters(problem)
    for slot, members in triples.segments():
        for i, module in enumerate(adapters.get(slot, ())):
            if module is not None:
                x = form.inputs(operand(problem, "x")[triples.rows[members]])
                h[members, i, : module.rank] = kept(sum_terms(x[:, :, None] * form.inputs(module.a).T[None], form.how))
    return {"h": h}


def expand(problem: Problem, form: Form) -> Mapping[str, Floats]:
    assert isinstance(problem, ExpandProblem)
    h = operand(problem, "h")

    def given(members: npt.NDArray[np.int64], index: int, rank: int) -> Floats:
        return h[members, index, :rank]

    y = deltas(operand(problem, "y"), None, *_adapters(problem), form, problem.case.dtype, given)
    return {"y": y, "returned": y}


def embedding(problem: Problem, form: Form) -> Mapping[str, Floats]:
    assert isinstance(problem, EmbeddingProblem)
    table, local = problem.weight.matrix.values.astype(np.float64), problem.ids - problem.start
    inside = (local >= 0) & (local < len(table))
    x = np.zeros((len(local), table.shape[1]))
    x[inside] = table[local[inside]]
    triples = _triples(problem)
    adapters = problem.adapters.oracle()
    for slot, members in triples.segments():
        module = adapters.get(slot, (None,))[0]
        if module is not None and len(table):
            rows = triples.rows[members]

            def found(_: npt.NDArray[np.int64], __: int, ___: int, rows: npt.NDArray[np.int64] = rows) -> Floats:
                columns = np.where(inside[rows], local[rows], 0)
                return np.where(inside[rows, None], module.a[:, columns].T, 0.0)  # noqa: B023

            only = Triples(rows=rows, slots=triples.slots[members], mix=triples.mix[members])
            x = deltas(x, None, {slot: (module,)}, only, (0,), form, problem.case.dtype, found)
    return {"x": x}


def _triples(problem: EmbeddingProblem | LoraProblem | StationProblem) -> Triples:
    rows = problem.rows
    return Triples(
        rows=rows.rows.astype(np.int64), slots=rows.slots.astype(np.int64), mix=rows.weights.astype(np.float64)
    )


def _adapters(problem: LoraProblem | StationProblem) -> tuple[Mapping[int, Adapter], Triples, tuple[int, ...]]:
    return problem.adapters.oracle(), _triples(problem), problem.weight.starts


# -- stations ----------------------------------------------------------------------------------------------------------


def between(problem: Problem, form: Form) -> Round:
    """What is done to a result between two parts."""
    return rounding(FORMATS[problem.case.dtype]) if form.parts else f32


def projected(problem: StationProblem, form: Form, start: Floats | None = None) -> Floats:
    """linear (plus ``start``, where the form's residual is not last) and adapters, before the result is stored."""
    bias = problem.weight.bias
    w = problem.weight.matrix.values.astype(np.float64)
    first = np.zeros(w.shape[0]) if bias is None else bias.values.astype(np.float64)
    if start is not None and form.residual == "start":
        y = product(operand(problem, "x"), w, f32(first + start), replace(form, first=True))
        start = None
    else:
        y = product(operand(problem, "x"), w, None if bias is None else first, form)
    if not len(problem.rows):
        return y if start is None else f32(y + start)
    if start is not None and form.residual == "deltas":
        extra = deltas(start, operand(problem, "x"), *_adapters(problem), form, problem.case.dtype)
        return f32(y + between(problem, form)(extra))
    if start is not None:
        y = f32(between(problem, form)(y) + start)
    y = between(problem, form)(y)
    return deltas(y, operand(problem, "x"), *_adapters(problem), form, problem.case.dtype)


def column_linear(problem: Problem, form: Form) -> Mapping[str, Floats]:
    assert isinstance(problem, StationProblem)
    return {"y": projected(problem, form)}


def gate_up_act(problem: Problem, form: Form) -> Mapping[str, Floats]:
    assert isinstance(problem, StationProblem)
    gate, up = np.split(between(problem, form)(projected(problem, form)), 2, axis=1)
    silu = f32(gate / f32(1 + f32(np.exp(-gate))))
    return {"y": f32(between(problem, form)(silu) * up)}


def _normed(s: Floats, weight: Floats, eps: float, form: Form, kept: Round) -> Floats:
    squares = (f32(s * s)).reshape(-1, s.shape[-1])
    total = sum_terms(squares[:, :, None], form.how).reshape(*s.shape[:-1], 1)
    rstd = f32(1 / np.sqrt(f32(f32(total * f32(1 / max(s.shape[-1], 1))) + f32(eps))))
    return f32(kept(f32(s * rstd)) * weight)


def row_parallel_add_norm(problem: Problem, form: Form) -> Mapping[str, Floats]:
    assert isinstance(problem, RowParallelAddNormProblem)
    to, residual = between(problem, form), operand(problem, "residual")
    last = form.residual == "last"
    s = f32(to(projected(problem, form)) + residual) if last else projected(problem, form, residual)
    eps = problem.case.attributes["eps"]
    assert isinstance(eps, float)
    return {"normed": _normed(to(s), operand(problem, "norm_weight"), eps, form, to), "residual": s}


def qkv_rope_cache(problem: Problem, form: Form) -> Mapping[str, Floats]:
    assert isinstance(problem, QkvRopeCacheProblem)
    to, head_dim = between(problem, form), problem.case.dim("head_dim")
    y = to(projected(problem, form))
    q, k, v = (
        y[:, a:b].reshape(problem.count, (b - a) // head_dim, head_dim)
        for a, b in itertools.pairwise(problem.weight.starts)
    )
    eps = problem.case.attributes["eps"]
    assert isinstance(eps, float)
    if problem.normed:
        q = to(_normed(q, operand(problem, "q_norm"), eps, form, to))
        k = to(_normed(k, operand(problem, "k_norm"), eps, form, to))
    cos, sin = (t.values.astype(np.float64)[problem.positions][:, None, :] for t in (problem.cos, problem.sin))
    q, k = (turned(part, cos, sin, problem.style) for part in (q, k))
    return {"q": q, "k": k[problem.kept], "v": v[problem.kept]}
