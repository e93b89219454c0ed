"""How far log-probabilities of a whole model may be from the exact ones, for rounding alone.

A bound that is carried through a model grows beyond any use. So the model is run in float64 with every station's result
moved at random within its own bound, a number of times: the errors of a right implementation are smaller than these and
as independent of each other, and the model is as good as linear in them. The spread that this gives, widened for how
little some runs say of it and for the largest of all tokens, bounds the rounding of the whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from polyaccel_conformance.formats import Format
from polyaccel_conformance.models.chain import Chain, Linear, Mask, SparseWeights, visible
from polyaccel_conformance.models.families import NORM_EPS
from polyaccel_conformance.models.reference import Reference, Request
from polyaccel_conformance.oracle.bounded import Bounded, deviations, finish
from polyaccel_conformance.oracle.gemm import linear
from polyaccel_conformance.oracle.lora import Triples

Floats = npt.NDArray[np.float64]
Nudge = Callable[[str, Floats], Floats]

RUNS = 16
WIDENED = 3.5
"""The spread of 16 normal numbers is less than a 3.5th of the true one with a probability of 4e-7 (chi-square)."""
WORLD = 4
"""Ranks over which a sum may be spread."""
UNIFORM = math.sqrt(3)
"""An error within +-b has the scale b (Hoeffding 1963), a uniform one there a standard deviation of b / sqrt(3)."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rounding:
    """Of each request, the log-probabilities of its tokens from the second on: exact, and by how much a right
    implementation's may differ."""

    exact: tuple[Floats, ...]
    tolerance: tuple[Floats, ...]


def rounding(reference: Reference, requests: Sequence[Request], seed: int = 0) -> Rounding:
    """Of all tokens of the requests, each predicted from those before it."""
    whole = [replace(request, queries=len(request.ids)) for request in requests]
    chains = _chains(reference, whole)
    bounds = _bounds(reference, chains, whole)
    # The same stream of bits on every platform (NumPy's NEP 19).
    generator = np.random.Generator(np.random.PCG64(seed))

    def nudge(station: str, value: Floats) -> Floats:
        return value + generator.uniform(-1.0, 1.0, value.shape) * bounds[station].reshape(value.shape)

    exact = _logprobs(reference, chains, whole, lambda _, value: value)
    runs = [_logprobs(reference, chains, whole, nudge) for _ in range(RUNS)]
    factor = deviations(sum(map(len, exact))) * UNIFORM * WIDENED
    tolerance = tuple(
        factor * np.sqrt(np.mean([(run[i] - value) ** 2 for run in runs], axis=0)) for i, value in enumerate(exact)
    )
    return Rounding(exact=tuple(exact), tolerance=tolerance)


# -- the bound of every station ----------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Bounds:
    """Notes every station's bound, its output's rounding included."""

    prefix: str
    found: dict[str, Floats]
    seen: dict[str, Floats] = field(default_factory=dict)

    def see(self, station: str, expected: Bounded, to: Format, clear: Mask | None = None) -> Floats:
        self.found[self.prefix + station] = finish(expected, to).tolerance
        self.seen[station] = expected.value
        return expected.value

    def ranks(self, station: str) -> Sequence[Floats]:
        return [self.seen[station]]


def _bounds(reference: Reference, chains: Sequence[Chain], requests: Sequence[Request]) -> Mapping[str, Floats]:
    first, residual = reference.begin(requests)
    found = {"x": finish(first, reference.format).tolerance}
    x = first.value
    for number, chain in enumerate(chains):
        witness = _Bounds(f"{number}.", found)
        x, residual = chain.run(reference.afresh(x, residual, requests), witness)
        _round_sums(chain, f"{number}.", witness.seen, found)
    found["logits"] = finish(linear(x, reference.head), reference.format).tolerance
    return found


def _round_sums(chain: Chain, prefix: str, seen: Mapping[str, Floats], found: dict[str, Floats]) -> None:
    """Add what the sums over ranks may round: each rank's part, and the sum once for each further rank."""
    own, unit = chain.weights, chain.out.unit
    sizes = {"o": np.abs(seen["attention"]) @ np.abs(own.o.matrix).T}
    if isinstance(own.feed_forward, SparseWeights):
        sizes["experts"] = _mixture(own.feed_forward, seen["o"], lambda _, value: value, np.abs)
    else:
        sizes["down"] = np.abs(seen["gate_up"]) @ np.abs(own.feed_forward.down.matrix).T
    for station, size in sizes.items():
        name = prefix + (station if station == "experts" else f"{station} residual")
        found[name] = found[name] + WORLD * unit * size


# -- the model in float64 ----------------------------------------------------------------------------------------------


def _chains(reference: Reference, requests: Sequence[Request]) -> list[Chain]:
    return [reference.chain(number, requests, (reference.whole(),), 0) for number in range(reference.family.layers)]


def _logprobs(reference: Reference, chains: Sequence[Chain], requests: Sequence[Request], nudge: Nudge) -> list[Floats]:
    residual = reference.embedding[np.concatenate([request.ids for request in requests])]
    x = nudge("x", _normed(residual, reference.first_norm))
    for number, chain in enumerate(chains):
        x, residual = _layer(chain, x, residual, _within_layer(nudge, number))
    logits = nudge("logits", x @ reference.head.T)
    logits = logits - logits.max(-1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    found, first = [], 0
    for request in requests:
        rows = np.arange(first, first + len(request.ids) - 1)
        found.append(logits[rows, request.ids[1:]])
        first += len(request.ids)
    return found


def _within_layer(nudge: Nudge, number: int) -> Nudge:
    return lambda station, value: nudge(f"{number}.{station}", value)


def _layer(chain: Chain, x: Floats, residual: Floats, nudge: Nudge) -> tuple[Floats, Floats]:
    own, triples = chain.weights, chain.tokens.triples
    d, tokens = own.head_dim, len(x)
    norms = own.norms if own.norms is not None else (None, None)
    q, k = (
        nudge(name, _turned(_applied(x, part, triples).reshape(tokens, -1, d), norm, chain))
        for name, part, norm in (("q", own.q, norms[0]), ("k", own.k, norms[1]))
    )
    v = nudge("v", _applied(x, own.v, triples).reshape(tokens, -1, d))
    attended = nudge("attention", _attended(chain, q, k, v))
    x, residual = _add_norm("o", _applied(attended, own.o, triples), residual, own.attention_norm, nudge)
    if isinstance(own.feed_forward, SparseWeights):
        y = nudge("experts", _mixture(own.feed_forward, x, nudge))
        return _add_norm("norm", y, residual, own.feed_forward_norm, nudge)
    gate, up = (_applied(x, part, triples) for part in (own.feed_forward.gate, own.feed_forward.up))
    gated = nudge("gate_up", gate / (1 + np.exp(-gate)) * up)
    return _add_norm("down", _applied(gated, own.feed_forward.down, triples), residual, own.feed_forward_norm, nudge)


def _applied(x: Floats, weight: Linear, triples: Triples) -> Floats:
    y: Floats = x @ weight.matrix.T
    for slot, members in triples.segments():
        module, rows = weight.adapters.get(slot), triples.rows[members]
        if module is not None:
            y[rows] += triples.mix[members][:, None] * (x[rows] @ module.a.T @ module.b.T)
    return y


def _turned(y: Floats, norm: Floats | None, chain: Chain) -> Floats:
    if norm is not None:
        y = _normed(y, norm)
    half = y.shape[-1] // 2
    a, b = y[..., :half], y[..., half:]
    c, s = chain.tokens.cos[:, None], chain.tokens.sin[:, None]
    return np.concatenate([a * c - b * s, b * c + a * s], axis=-1)


def _attended(chain: Chain, q: Floats, k: Floats, v: Floats) -> Floats:
    group, found, first = q.shape[1] // k.shape[1], [], 0
    for queries in chain.tokens.queries:
        rows = slice(first, first + queries)
        first += queries
        keys, values = (np.repeat(part[rows], group, axis=1).transpose(1, 0, 2) for part in (k, v))
        scores = q[rows].transpose(1, 0, 2) @ keys.transpose(0, 2, 1) * chain.weights.head_dim**-0.5
        scores = np.where(visible(queries, queries, chain.weights.window), scores, -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        found.append((p @ values).transpose(1, 0, 2).reshape(queries, -1))
    return np.concatenate(found)


def _mixture(
    own: SparseWeights, x: Floats, nudge: Nudge, part: Callable[[Floats], Floats] = lambda value: value
) -> Floats:
    """``part`` is applied to both factors of the last product."""
    logits = nudge("router", x @ own.router.matrix.T)
    scores = np.exp(logits - logits.max(-1, keepdims=True))
    ids = np.argsort(-scores, axis=-1, kind="stable")[:, : own.top_k]
    weights = np.take_along_axis(scores, ids, -1)
    weights = nudge("weights", weights / weights.sum(-1, keepdims=True))
    y = np.zeros_like(x)
    for expert in range(len(own.down)):
        token, choice = np.nonzero(ids == expert)
        gate = x[token] @ own.gate[expert].T
        inner = gate / (1 + np.exp(-gate)) * (x[token] @ own.up[expert].T)
        np.add.at(y, token, weights[token, choice][:, None] * (part(inner) @ part(own.down[expert]).T))
    return y


def _add_norm(station: str, y: Floats, residual: Floats, norm: Floats, nudge: Nudge) -> tuple[Floats, Floats]:
    s = nudge(f"{station} residual", y + residual)
    return nudge(station, _normed(s, norm)), s


def _normed(x: Floats, weight: Floats) -> Floats:
    scaled: Floats = x / np.sqrt((x**2).mean(-1, keepdims=True) + NORM_EPS) * weight
    return scaled
