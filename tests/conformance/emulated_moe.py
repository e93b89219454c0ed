"""Implementations of routing and of the experts, emulated on the host operands of a problem."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import numpy.typing as npt

from polyaccel_conformance.formats import FORMATS
from polyaccel_conformance.problem import Problem
from polyaccel_conformance.problems.moe_experts import MoeExpertsProblem
from polyaccel_conformance.problems.moe_route import MoeRouteProblem
from tests.conformance.drawn import Emulation, operand
from tests.conformance.emulation import LEGITIMATE, f32, rounding, sum_terms

Floats = npt.NDArray[np.float64]
Round = Callable[[npt.ArrayLike], Floats]
ULP = 2.0**-23


def exp(x: Floats, how: str) -> Floats:
    """Within two units in the last place, in several ways; ``base two`` rounds the scaled argument."""
    with np.errstate(over="ignore"):
        if how == "low":
            return f32(f32(np.exp(x)) * (1 - 2 * ULP))
        if how == "high":
            return f32(f32(np.exp(x)) * (1 + 1.9 * ULP))
        return f32(np.exp(x))


def emulated_route(
    problem: Problem, how: str, *, exps: str = "nearest", to: Round = f32, subtract: bool = True
) -> Mapping[str, Floats]:
    assert isinstance(problem, MoeRouteProblem)
    logits, routing = operand(problem, "logits"), problem.routing
    ids = np.asarray(problem.expected()["ids"].values)

    def softmax(x: Floats) -> Floats:
        shifted = to(x - x.max(-1, keepdims=True)) if subtract else x
        mass = to(exp(shifted, exps))
        return to(mass / to(sum_terms(mass, how))[:, None])

    if routing.scoring == "softmax_topk":
        weights = np.take_along_axis(softmax(logits), ids, -1)
    elif routing.scoring == "topk_softmax":
        weights = softmax(np.take_along_axis(logits, ids, -1))
    else:
        weights = np.take_along_axis(to(1 / to(1 + to(exp(-logits, exps)))), ids, -1)
    if routing.renormalise:
        weights = to(weights / to(sum_terms(weights, how))[:, None])
    return {"weights": to(weights * routing.scale)}


ROUTES: Mapping[str, Emulation] = {
    **{how: partial(emulated_route, how=how) for how in LEGITIMATE},
    "exp two ulps low": partial(emulated_route, how="sequential", exps="low"),
    "exp two ulps high": partial(emulated_route, how="chunk16 truncating", exps="high"),
    "nothing subtracted": partial(emulated_route, how="pairwise", subtract=False),
}


def emulated_experts(
    problem: Problem,
    how: str,
    *,
    kept: bool = False,
    kept_h: bool = False,
    to: Round = f32,
    operands: Round | None = None,
) -> Mapping[str, Floats]:
    """Pair by pair; ``kept``: gate_up and act in x's dtype; ``kept_h``: h too."""
    assert isinstance(problem, MoeExpertsProblem)
    keep = rounding(FORMATS[problem.case.dtype])
    x, weights = operand(problem, "x"), operand(problem, "weights")
    read = operands if operands is not None else lambda values: np.asarray(values, dtype=np.float64)
    deltas = {site: problem._deltas(weight) for site, weight in (("up", problem.gate_up), ("down", problem.down))}

    def product(row: Floats, matrix: Floats) -> Floats:
        return to(sum_terms((read(row)[None, :] * read(matrix))[:, :], how)) if matrix.size else np.zeros(len(matrix))

    def project(row: Floats, weight: object, site: str, token: int, expert: int) -> Floats:
        projection = weight.projection()  # type: ignore[attr-defined]
        y = product(row, projection.matrix[expert])
        if projection.bias is not None:
            y = to(y + projection.bias[expert])
        y = keep(y) if kept and site == "up" else y
        starts = np.cumsum([0, *projection.slices])
        for delta in deltas[site]:
            if delta.mix[token]:
                h = product(row, delta.a[expert])
                h = keep(h) if kept_h else h
                part = slice(starts[delta.slice], starts[delta.slice + 1])
                y[part] = to(y[part] + product(to(h * delta.mix[token]), delta.b[expert]))
        return keep(y) if kept and site == "up" else y

    out = np.zeros((x.shape[0], problem.down.matrix.shape[1]))
    for token in range(x.shape[0]):
        for choice, expert in enumerate(problem.local[token].tolist()):
            if expert < 0:
                continue
            gate, up = np.split(project(x[token], problem.gate_up, "up", token, expert), 2)
            with np.errstate(over="ignore"):
                inner = to(to(gate / to(1 + to(np.exp(-gate)))) * up)
            y = project(keep(inner) if kept else inner, problem.down, "down", token, expert)
            out[token] = to(out[token] + to(weights[token, choice] * y))
    return {"y": out}


EXPERTS: Mapping[str, Emulation] = {
    **{how: partial(emulated_experts, how=how) for how in ("sequential", "pairwise", "split-K")},
    "chunk16 truncating": partial(emulated_experts, how="chunk16 truncating"),
    "everything kept": partial(emulated_experts, how="sequential", kept=True, kept_h=True),
    "h kept": partial(emulated_experts, how="chunk16 aligned", kept_h=True),
}
