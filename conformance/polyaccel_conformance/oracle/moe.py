"""Routing and experts in float64, with bounds.

Sources: switch routing and its variants as in Mixtral (arXiv 2401.04088: the largest, then softmax), Qwen-MoE (softmax,
then the largest, renormalised) and DeepSeek-V3 (arXiv 2412.19437: sigmoid, a bias that only chooses, groups).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from polyaccel_conformance.formats import Format
from polyaccel_conformance.oracle.bounded import Bounded, cast, concatenate
from polyaccel_conformance.oracle.functions import divide, sigmoid, silu, softmax
from polyaccel_conformance.oracle.primitives import add, matmul, multiply, total

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

EXP_ULPS = 2
DIVIDE_ULPS = 1


# -- routing -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """Attributes of ``moe_route``."""

    top_k: int
    scoring: str
    renormalise: bool
    groups: int = 1
    topk_groups: int = 1
    scale: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Routed:
    """``ids: [T, top_k]``, ``weights: [T, top_k]`` float32, ``clear: [T]``: no other choice lies within the bounds."""

    ids: Ints
    weights: Bounded
    clear: npt.NDArray[np.bool_]


def largest(scores: Bounded, count: int) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """Ids of the largest of the last dimension in falling order, lowest first among equals; and whether the bounds of
    no two overlap that are not equal.

    Equal scores come from equal operands, so that every implementation finds them equal.
    """
    order = np.argsort(-scores.value, axis=-1, kind="stable")
    value = np.take_along_axis(scores.value, order, -1)
    bound = np.take_along_axis(scores.bound, order, -1)
    below = np.maximum.accumulate((value + bound)[..., ::-1], axis=-1)[..., ::-1][..., 1:]
    apart = (value - bound)[..., :-1] > below
    equal = value[..., :-1] == value[..., 1:]
    clear = (apart | equal)[..., :count].all(-1)
    return order[..., :count].astype(np.int64), clear


def route(logits: Floats, bias: Floats | None, routing: Routing) -> Routed:
    """``moe_route`` of ``logits: [T, experts]``; ``bias: [experts]`` or None."""
    x = Bounded.exact(logits)
    top_k = routing.top_k
    if routing.scoring == "softmax_topk":
        scores = softmax(x, EXP_ULPS, DIVIDE_ULPS)
        ids, clear = largest(scores, top_k)
        weights = _gather(scores, ids)
    elif routing.scoring == "topk_softmax":
        ids, clear = largest(x, top_k)
        weights = softmax(_gather(x, ids), EXP_ULPS, DIVIDE_ULPS)
    else:
        plain = sigmoid(x, EXP_ULPS, DIVIDE_ULPS)
        choice = plain if bias is None else add(plain, Bounded.exact(np.broadcast_to(bias, logits.shape)))
        clear = np.ones(len(logits), dtype=bool)
        if routing.groups > 1:
            choice, clear = _restrict(choice, routing)
        ids, chosen = largest(choice, top_k)
        clear &= chosen
        weights = _gather(plain, ids)
    if routing.renormalise:
        weights = divide(weights, total(weights, order="structured"), DIVIDE_ULPS)
    if routing.scale != 1.0:
        weights = multiply(weights, Bounded.exact(np.full(weights.shape, routing.scale)))
    return Routed(ids=ids, weights=weights, clear=clear)


def _gather(x: Bounded, ids: Ints) -> Bounded:
    return x.map(lambda part: np.take_along_axis(part, ids, -1))


def _restrict(choice: Bounded, routing: Routing) -> tuple[Bounded, npt.NDArray[np.bool_]]:
    """Scores outside of the best groups become minus infinity."""
    tokens, experts = choice.shape
    size = experts // routing.groups
    grouped = choice.reshape(tokens, routing.groups, size)
    order = np.argsort(-grouped.value, axis=-1, kind="stable")[..., : min(2, size)]
    best = _gather(grouped, order)
    score = best[..., 0] if size == 1 else add(best[..., 0], best[..., 1])
    # Which two are the best may be open where their sum is not; the sum then moves by no more than any bound.
    score = Bounded(score.value, score.bound + grouped.bound.max(-1))
    kept, clear = largest(score, routing.topk_groups)
    inside = np.zeros((tokens, routing.groups, 1), dtype=bool)
    np.put_along_axis(inside, kept[..., None], True, 1)
    value = np.where(inside, grouped.value, -np.inf).reshape(tokens, experts)
    bound = np.where(inside, grouped.bound, 0.0).reshape(tokens, experts)
    return Bounded(value, bound), clear


# -- experts -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Projection:
    """Weights of all held experts: ``matrix: [experts, n, k]`` as dequantised, ``bias: [experts, n]`` or None, rows of
    each slice."""

    matrix: Floats
    bias: Floats | None
    slices: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertDelta:
    """One adapter at one slice of a projection.

    Attributes:
        slice: of the projection.
        a, b: ``[experts, rank, k]`` and ``[experts, n of the slice, rank]``, zero where an expert is not adapted.
        mix: ``[T]`` the mix weight of each token, 0 where the token does not use the adapter.
    """

    slice: int
    a: Floats
    b: Floats
    mix: Floats


def experts(
    x: Floats,
    gate_up: Projection,
    down: Projection,
    local: Ints,
    weights: Floats,
    deltas: tuple[tuple[ExpertDelta, ...], tuple[ExpertDelta, ...]],
    keep: Format,
) -> Bounded:
    """``moe_experts``: ``[T, hidden]`` before the output rounding.

    Args:
        local: ``[T, top_k]`` this rank's expert, -1 for another rank's.
        weights: ``[T, top_k]`` of the routing.
        deltas: adapters on gate_up and on down.
        keep: the coarsest permitted format of the intermediate results gate_up, act and h.
    """
    tokens, hidden = x.shape[0], down.matrix.shape[1]
    token, choice = np.nonzero(local >= 0)
    expert = local[token, choice]
    inputs = Bounded.exact(x[token])
    both = _project(inputs, gate_up, expert, token, deltas[0], keep, kept=True)
    half = gate_up.slices[0]
    inner = cast(multiply(silu(both[:, :half], EXP_ULPS, DIVIDE_ULPS), both[:, half:]), keep, "act")
    outputs = _project(inner, down, expert, token, deltas[1], keep, kept=False)
    outputs = multiply(outputs, Bounded.exact(np.broadcast_to(weights[token, choice][:, None], outputs.shape)))
    # Choices of other ranks are zeros: they add neither value nor error.
    placed = outputs.map(lambda part: _scatter(part, token, choice, (tokens, local.shape[1], hidden)))
    summed = total(placed, axis=1, order="structured")
    return summed.reshape(tokens, hidden)


def _project(
    x: Bounded,
    projection: Projection,
    expert: Ints,
    token: Ints,
    deltas: tuple[ExpertDelta, ...],
    keep: Format,
    *,
    kept: bool,
) -> Bounded:
    """``x: [pairs, k]`` through the matrix of each pair's expert, with adapters.

    ``kept``: the result may be kept in ``keep``, before the adapters are added and after.
    """
    y = _rows(x, projection.matrix[expert])
    if projection.bias is not None:
        y = add(y, Bounded.exact(projection.bias[expert]))
    if kept:
        y = cast(y, keep, "gate_up")
    starts = np.cumsum([0, *projection.slices])
    parts = [y[:, starts[i] : starts[i + 1]] for i in range(len(projection.slices))]
    for delta in deltas:
        # A mix weight of zero adds a zero.
        use = np.flatnonzero(delta.mix[token] != 0)
        if not len(use):
            continue
        h = cast(_rows(x[use], delta.a[expert[use]]), keep, "h")
        h = multiply(h, Bounded.exact(np.broadcast_to(delta.mix[token[use]][:, None], h.shape)))
        added = add(parts[delta.slice][use], _rows(h, delta.b[expert[use]]))
        if kept:
            added = cast(added, keep, "gate_up")
        parts[delta.slice] = _replace(parts[delta.slice], use, added)
    return parts[0] if len(parts) == 1 else concatenate(parts)


def _rows(x: Bounded, matrices: Floats) -> Bounded:
    """Row i of ``x: [pairs, k]`` times matrix i of ``[pairs, n, k]``."""
    product = matmul(x.reshape(x.shape[0], 1, x.shape[1]), Bounded.exact(np.swapaxes(matrices, 1, 2)))
    return product.reshape(x.shape[0], matrices.shape[1])


def _replace(whole: Bounded, rows: Ints, part: Bounded) -> Bounded:
    value, bound = whole.value.copy(), whole.bound.copy()
    value[rows], bound[rows] = part.value, part.bound
    return Bounded(value, bound, (("adapted projection", bound),))


def _scatter(part: Floats, token: Ints, choice: Ints, shape: tuple[int, ...]) -> Floats:
    placed = np.zeros(shape)
    placed[token, choice] = part
    return placed
