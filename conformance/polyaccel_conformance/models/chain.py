"""One decoder layer as the chain of its stations, each judged on what the one before it really handed on.

A bound that is carried through a whole layer grows beyond any use: attention alone multiplies it by ten. So a layer is
fed the reference's input, and every station's result is compared with the oracle's on the operands that this very run
gave it. How the stations are joined is the reference's business: a model that passes on a wrong tensor, position, norm
or window disagrees with it like a wrong operator does.

Structure: Llama (arXiv 2302.13971), Qwen3's norms of each head (arXiv 2505.09388), Mixtral (arXiv 2401.04088).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from polyaccel_conformance.formats import FORMATS, Format
from polyaccel_conformance.multi.problem import summed
from polyaccel_conformance.oracle.attention import attention
from polyaccel_conformance.oracle.bounded import Bounded, cast, coarser, concatenate
from polyaccel_conformance.oracle.lora import Delta, Module, Triples, sgmv, shrink
from polyaccel_conformance.oracle.moe import Projection as Experts
from polyaccel_conformance.oracle.moe import Routing, experts, route
from polyaccel_conformance.oracle.norm import residual_sum, rms_norm
from polyaccel_conformance.oracle.primitives import add
from polyaccel_conformance.oracle.stations import Projection, column_linear, gate_up_act, joined, turned_heads

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Linear:
    """``matrix: [n, k]`` as stored, and the adapters on it by slot, with the scale in B."""

    matrix: Floats
    adapters: Mapping[int, Module]

    def rows(self, rows: Ints) -> Linear:
        """Cut by output."""
        return Linear(matrix=self.matrix[rows], adapters={s: replace(m, b=m.b[rows]) for s, m in self.adapters.items()})

    def columns(self, columns: Ints) -> Linear:
        """Cut by input."""
        return Linear(
            matrix=self.matrix[:, columns],
            adapters={s: replace(m, a=m.a[:, columns]) for s, m in self.adapters.items()},
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DenseWeights:
    """``down(silu(gate(x)) * up(x))``."""

    gate: Linear
    up: Linear
    down: Linear


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SparseWeights:
    """``router: [experts, hidden]``, ``gate, up: [experts, n, hidden]``, ``down: [experts, hidden, n]``, ``top_k``."""

    router: Linear
    gate: Floats
    up: Floats
    down: Floats
    top_k: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerWeights:
    """A layer, whole.

    Attributes:
        norms: weights of the norms of each head of q and k; None where there are none.
        window: how many tokens back attention sees, the token itself included; None for all.
        attention_norm, feed_forward_norm: the norm that follows each half.
    """

    q: Linear
    k: Linear
    v: Linear
    o: Linear
    norms: tuple[Floats, Floats] | None
    window: int | None
    head_dim: int
    attention_norm: Floats
    feed_forward: DenseWeights | SparseWeights
    feed_forward_norm: Floats
    eps: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RankShare:
    """What a rank holds: half-open ranges of query heads and of KV heads, and columns of the intermediate dimension."""

    heads: tuple[int, int]
    kv_heads: tuple[int, int]
    inner: tuple[tuple[int, int], ...]

    def rows(self, of: tuple[int, int], head_dim: int) -> Ints:
        """Rows of a projection to these heads."""
        return np.arange(of[0] * head_dim, of[1] * head_dim)

    @property
    def columns(self) -> Ints:
        """Of the intermediate dimension."""
        return np.concatenate([np.zeros(0, dtype=np.int64), *(np.arange(begin, end) for begin, end in self.inner)])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepTokens:
    """A step, for a layer.

    Attributes:
        queries: tokens of each sequence in this step; ``contexts``: of each in all, these included.
        cos, sin: ``[T, head_dim / 2]`` of each token's position.
        triples: which tokens use which adapters.
    """

    queries: tuple[int, ...]
    contexts: tuple[int, ...]
    cos: Floats
    sin: Floats
    triples: Triples


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerInput:
    """What a layer is fed, as stored: ``x, residual: [T, hidden]`` and, of each sequence, keys and values of the tokens
    before this step's, ``[m, kv_heads, head_dim]`` of all heads."""

    x: Floats
    residual: Floats
    older: tuple[tuple[Floats, Floats], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowances:
    """Units in the last place that the contract allows."""

    exp: int
    divide: int
    rsqrt: int


class Witness(Protocol):
    """Who knows what came out at each station of a layer."""

    def see(self, station: str, expected: Bounded, to: Format, clear: Mask | None = None) -> Floats:
        """This rank's result, which must be ``expected`` rounded to ``to``; rows that are not ``clear`` may be any."""

    def ranks(self, station: str) -> Sequence[Floats]:
        """Every rank's result."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Chain:
    """The stations of a layer on one rank of several.

    ``shares``: of all ranks; ``out``: dtype of the activations, in which intermediate results may be kept.
    """

    weights: LayerWeights
    tokens: StepTokens
    shares: Sequence[RankShare]
    rank: int
    out: Format
    allowed: Allowances

    def run(self, given: LayerInput, witness: Witness) -> tuple[Floats, Floats]:
        """``(normed, residual)`` that the layer hands on, as the witness saw them."""
        self._attend(given, witness)
        normed, residual = self._add_norm(
            "o", "attention", self.weights.o, self._heads_of, given.residual, self.weights.attention_norm, witness
        )
        own = self.weights.feed_forward
        if isinstance(own, SparseWeights):
            return self._sparse(own, normed, residual, witness)
        share = self.shares[self.rank].columns
        both = [self._column(normed, part.rows(share)) for part in (own.gate, own.up)]
        allowed = self.allowed
        gated = gate_up_act(concatenate(both), self.out, self.out, exp_ulps=allowed.exp, divide_ulps=allowed.divide)
        witness.see("gate_up", gated, self.out)
        columns = [share.columns for share in self.shares]
        norm = self.weights.feed_forward_norm
        return self._add_norm("down", "gate_up", own.down, columns, residual, norm, witness)

    # -- attention ---------------------------------------------------------------------------------------------------

    @property
    def _heads_of(self) -> list[Ints]:
        return [share.rows(share.heads, self.weights.head_dim) for share in self.shares]

    def _attend(self, given: LayerInput, witness: Witness) -> None:
        own, share, d = self.weights, self.shares[self.rank], self.weights.head_dim
        norms = own.norms if own.norms is not None else (None, None)
        q = self._turned(self._column(given.x, own.q.rows(share.rows(share.heads, d))), norms[0])
        k = self._turned(self._column(given.x, own.k.rows(share.rows(share.kv_heads, d))), norms[1])
        v = self._column(given.x, own.v.rows(share.rows(share.kv_heads, d))).reshape(len(given.x), -1, d)
        seen_q, seen_k, seen_v = (witness.see(name, y, self.out) for name, y in (("q", q), ("k", k), ("v", v)))
        held = slice(*share.kv_heads)
        found, first = [], 0
        for queries, context, (old_k, old_v) in zip(
            self.tokens.queries, self.tokens.contexts, given.older, strict=True
        ):
            rows = slice(first, first + queries)
            first += queries
            found.append(
                attention(
                    seen_q[rows],
                    np.concatenate([old_k[:, held], seen_k[rows]]),
                    np.concatenate([old_v[:, held], seen_v[rows]]),
                    visible(queries, context, own.window),
                    d**-0.5,
                    p_format=self.out,
                    exp_ulps=self.allowed.exp,
                    divide_ulps=self.allowed.divide,
                )
            )
        witness.see("attention", concatenate(found, axis=0).reshape(len(given.x), -1), self.out)

    def _turned(self, y: Bounded, norm: Floats | None) -> Bounded:
        heads = y.reshape(y.shape[0], -1, self.weights.head_dim)
        normed = None if norm is None else (norm, self.weights.eps, self.out, self.allowed.rsqrt)
        return turned_heads(heads, self.tokens.cos, self.tokens.sin, "half", self.out, normed)

    # -- experts -----------------------------------------------------------------------------------------------------

    def _sparse(self, own: SparseWeights, x: Floats, residual: Floats, witness: Witness) -> tuple[Floats, Floats]:
        logits = witness.see("router", self._column(x, own.router), self.out)
        routed = route(logits, None, Routing(top_k=own.top_k, scoring="softmax_topk", renormalise=True))
        single = FORMATS["float32"]
        ids = witness.see("ids", Bounded.exact(routed.ids), single, routed.clear).astype(np.int64)
        weights = witness.see("weights", routed.weights, single, routed.clear)
        columns = self.shares[self.rank].columns
        both = np.concatenate([own.gate[:, columns], own.up[:, columns]], axis=1)
        gate_up = Experts(matrix=both, bias=None, slices=(len(columns), len(columns)))
        down = Experts(matrix=own.down[:, :, columns], bias=None, slices=(own.down.shape[1],))
        y = witness.see("experts", experts(x, gate_up, down, ids, weights, ((), ()), self.out), self.out)
        if len(self.shares) > 1:
            parts = [Bounded.exact(part) for part in witness.ranks("experts")]
            y = witness.see("all_reduce", summed(parts, self.out, last=True), self.out)
        total, s = residual_sum(y, residual, self.out)
        norm = self.weights.feed_forward_norm
        normed = rms_norm(s, norm, self.weights.eps, normed=self.out, rsqrt_ulps=self.allowed.rsqrt)
        return witness.see("norm", normed, self.out), witness.see("norm residual", total, self.out)

    # -- linear layers -----------------------------------------------------------------------------------------------

    def _column(self, x: Floats, weight: Linear) -> Bounded:
        n = len(weight.matrix)
        projection = Projection(
            weight=weight.matrix,
            bias=None,
            adapters={slot: (module,) for slot, module in weight.adapters.items()},
            triples=self.tokens.triples,
            starts=(0, n),
        )
        return column_linear(x, projection, self.out)

    def _add_norm(
        self,
        station: str,
        source: str,
        weight: Linear,
        columns: Sequence[Ints],
        residual: Floats,
        norm: Floats,
        witness: Witness,
    ) -> tuple[Floats, Floats]:
        """``row_parallel_add_norm`` of what ``source`` gave on every rank."""
        xs, parts = witness.ranks(source), [weight.columns(own) for own in columns]
        last = add(cast(self._summed(xs, parts), self.out), Bounded.exact(residual))
        s = coarser(last, self._summed(xs, parts, residual))
        normed = rms_norm(cast(s, self.out), norm, self.weights.eps, normed=self.out, rsqrt_ulps=self.allowed.rsqrt)
        return witness.see(station, normed, self.out), witness.see(f"{station} residual", s, self.out)

    def _summed(self, xs: Sequence[Floats], parts: Sequence[Linear], addend: Floats | None = None) -> Bounded:
        """The sum over ranks before its last rounding, for the coarser of the two legal forms of an adapter;
        ``addend``: a term of the first rank's product."""
        out, triples = self.out, self.tokens.triples
        addends = [addend, *[None] * (len(parts) - 1)]
        plain = [
            cast(joined(x, part.matrix, None, out, addend=own), out)
            for x, part, own in zip(xs, parts, addends, strict=True)
        ]
        if not len(triples.rows):
            return summed(plain, out, last=True)
        added = []
        for y, x, part in zip(plain, xs, parts, strict=True):
            modules = {slot: (module,) for slot, module in part.adapters.items()}
            added.append(cast(sgmv(y, x, modules, triples, (0, len(part.matrix)), out)[0], out))
        ridden = Delta(summed(plain, out))
        for slot, members in triples.segments():
            held = [
                cast(shrink(x[triples.rows[members]], part.adapters[slot].a, out), out)
                for x, part in zip(xs, parts, strict=True)
                if slot in part.adapters
            ]
            if held:
                ridden.add(triples.rows[members], 0, summed(held, out), parts[0].adapters[slot].b, triples.mix[members])
        return coarser(summed(added, out, last=True), ridden.total())


def visible(queries: int, context: int, window: int | None) -> Mask:
    """``[queries, context]``: the queries are the last ones of the context; each sees itself and what came before, at
    most ``window`` tokens in all."""
    i = np.arange(context - queries, context)[:, None]
    j = np.arange(context)[None, :]
    seen: Mask = (j <= i) & (i - j < (context + 1 if window is None else window))
    return seen
