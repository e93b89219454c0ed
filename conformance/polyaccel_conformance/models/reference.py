"""The small models in float64: what each layer is fed, and what must come out at each of its stations."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from polyaccel.backend import OPERATORS
from polyaccel_conformance.formats import FORMATS, Format
from polyaccel_conformance.models.chain import (
    Allowances,
    Chain,
    DenseWeights,
    LayerInput,
    LayerWeights,
    Linear,
    Mask,
    RankShare,
    SparseWeights,
    StepTokens,
)
from polyaccel_conformance.models.families import (
    NORM_EPS,
    ROPE_THETA,
    Family,
    Floats32,
    SmallAdapter,
    adapter_tensors,
    tensors,
)
from polyaccel_conformance.oracle.bounded import Bounded
from polyaccel_conformance.oracle.lora import Module, Triples
from polyaccel_conformance.oracle.norm import rms_norm

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

ALLOWED = Allowances(
    exp=OPERATORS["paged_attention"].numerics.ulps["exp"],
    divide=OPERATORS["paged_attention"].numerics.ulps["divide"],
    rsqrt=OPERATORS["rms_norm"].numerics.ulps["rsqrt"],
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Request:
    """A sequence: all of its tokens, of which the last ``queries`` belong to the step, and the weights of its adapters
    by slot."""

    ids: Ints
    queries: int
    mix: Mapping[int, float]

    @property
    def older(self) -> int:
        return len(self.ids) - self.queries


class _Itself:
    """The reference as its own witness: every station gives the oracle's value, rounded."""

    def __init__(self) -> None:
        self.seen: dict[str, Floats] = {}

    def see(self, station: str, expected: Bounded, to: Format, clear: Mask | None = None) -> Floats:
        self.seen[station] = to.round(expected.value)
        return self.seen[station]

    def ranks(self, station: str) -> Sequence[Floats]:
        return [self.seen[station]]


class Reference:
    """A family's model with adapters, by slot."""

    def __init__(self, family: Family, adapters: Mapping[int, SmallAdapter], dtype: str = "float32") -> None:
        self.family, self.format = family, FORMATS[dtype]
        self._tensors = {name: self._stored(values) for name, values in tensors(family).items()}
        self._adapters = {slot: self._modules(adapter) for slot, adapter in adapters.items()}
        self._layers = tuple(self._layer(number) for number in range(family.layers))

    # -- weights -----------------------------------------------------------------------------------------------------

    def _stored(self, values: Floats32) -> Floats:
        return self.format.round(values.astype(np.float64))

    def _modules(self, adapter: SmallAdapter) -> dict[str, Module]:
        """By module name. B takes the scale of the true rank in float32 and is rounded once."""
        scale = np.float32(adapter.alpha / adapter.rank)
        return {
            name: Module(a=self._stored(a), b=self._stored(b * scale))
            for name, (a, b) in adapter_tensors(adapter, self.family).items()
        }

    def _linear(self, name: str) -> Linear:
        adapters = {slot: modules[name] for slot, modules in self._adapters.items() if name in modules}
        return Linear(matrix=self._tensors[f"{name}.weight"], adapters=adapters)

    def _layer(self, number: int) -> LayerWeights:
        family, stem = self.family, f"model.layers.{number}"
        q, k, v, o = (self._linear(f"{stem}.self_attn.{name}_proj") for name in "qkvo")
        norms = None
        if family.qk_norm:
            norms = (self._tensors[f"{stem}.self_attn.q_norm.weight"], self._tensors[f"{stem}.self_attn.k_norm.weight"])
        last = number == family.layers - 1
        after = "model.norm.weight" if last else f"model.layers.{number + 1}.input_layernorm.weight"
        return LayerWeights(
            q=q,
            k=k,
            v=v,
            o=o,
            norms=norms,
            window=family.windows[number],
            head_dim=family.head_dim,
            attention_norm=self._tensors[f"{stem}.post_attention_layernorm.weight"],
            feed_forward=self._sparse(stem) if family.experts else self._dense(stem),
            feed_forward_norm=self._tensors[after],
            eps=NORM_EPS,
        )

    def _dense(self, stem: str) -> DenseWeights:
        gate, up, down = (self._linear(f"{stem}.mlp.{name}_proj") for name in ("gate", "up", "down"))
        return DenseWeights(gate=gate, up=up, down=down)

    def _sparse(self, stem: str) -> SparseWeights:
        moe = f"{stem}.block_sparse_moe"
        gate, down, up = (
            np.stack([self._tensors[f"{moe}.experts.{e}.w{i}.weight"] for e in range(self.family.experts)])
            for i in (1, 2, 3)
        )
        router = Linear(matrix=self._tensors[f"{moe}.gate.weight"], adapters=MappingProxyType({}))
        return SparseWeights(router=router, gate=gate, up=up, down=down, top_k=self.family.experts_per_token)

    def digest(self) -> str:
        """A hash of all weights and adapters as stored."""
        hasher = hashlib.sha256()
        for name, values in self._tensors.items():
            hasher.update(name.encode() + values.astype("<f8").tobytes())
        for modules in self._adapters.values():
            for module in modules.values():
                hasher.update(module.a.astype("<f8").tobytes() + module.b.astype("<f8").tobytes())
        return hasher.hexdigest()[:16]

    # -- layers ------------------------------------------------------------------------------------------------------

    def chain(self, number: int, requests: Sequence[Request], shares: Sequence[RankShare], rank: int) -> Chain:
        """A layer in a step of these requests, as one rank sees it."""
        cos, sin = self._rotation(requests)
        tokens = StepTokens(
            queries=tuple(request.queries for request in requests),
            contexts=tuple(len(request.ids) for request in requests),
            cos=cos,
            sin=sin,
            triples=triples(requests),
        )
        weights = self._layers[number]
        return Chain(weights=weights, tokens=tokens, shares=shares, rank=rank, out=self.format, allowed=ALLOWED)

    def inputs(self, requests: Sequence[Request]) -> tuple[LayerInput, ...]:
        """What each layer is fed in a step: all tokens of the requests go through the layers before it, and every
        station's result is rounded."""
        whole = [replace(request, queries=len(request.ids)) for request in requests]
        starts = np.cumsum([0, *(len(request.ids) for request in requests)])
        own = np.concatenate(
            [np.arange(end - request.queries, end) for end, request in zip(starts[1:], requests, strict=True)]
        )
        first, residual = self.begin(requests)
        x = self.format.round(first.value)
        found: list[LayerInput] = []
        for number in range(self.family.layers):
            itself = _Itself()
            after = self.chain(number, whole, (self.whole(),), 0).run(self.afresh(x, residual, requests), itself)
            older = tuple(
                (itself.seen["k"][begin : begin + request.older], itself.seen["v"][begin : begin + request.older])
                for begin, request in zip(starts, requests, strict=False)
            )
            found.append(LayerInput(x=x[own], residual=residual[own], older=older))
            x, residual = after
        return tuple(found)

    def begin(self, requests: Sequence[Request]) -> tuple[Bounded, Floats]:
        """What the first layer is fed with all tokens of the requests: ``(normed, residual)``."""
        residual = self.embedding[np.concatenate([request.ids for request in requests])]
        normed = rms_norm(
            Bounded.exact(residual), self.first_norm, NORM_EPS, normed=self.format, rsqrt_ulps=ALLOWED.rsqrt
        )
        return normed, residual

    def afresh(self, x: Floats, residual: Floats, requests: Sequence[Request]) -> LayerInput:
        """A layer's input where nothing came before the step."""
        nothing = np.zeros((0, self.family.kv_heads, self.family.head_dim))
        return LayerInput(x=x, residual=residual, older=((nothing, nothing),) * len(requests))

    def whole(self) -> RankShare:
        """The share of a world of one."""
        family = self.family
        return RankShare(heads=(0, family.heads), kv_heads=(0, family.kv_heads), inner=((0, family.intermediate),))

    @property
    def embedding(self) -> Floats:
        """``[vocabulary, hidden]``."""
        return self._tensors["model.embed_tokens.weight"]

    @property
    def head(self) -> Floats:
        """``[vocabulary, hidden]`` of the language-model head."""
        return self.embedding if self.family.tied else self._tensors["lm_head.weight"]

    @property
    def first_norm(self) -> Floats:
        """``[hidden]``: before the first layer."""
        return self._tensors["model.layers.0.input_layernorm.weight"]

    def _rotation(self, requests: Sequence[Request]) -> tuple[Floats, Floats]:
        """Rows of the model's table of cosines and sines, which holds float32."""
        d = self.family.head_dim
        positions = np.concatenate([np.arange(request.older, len(request.ids)) for request in requests])
        angles = positions[:, None] * ROPE_THETA ** -(np.arange(0, d, 2) / d)
        single = FORMATS["float32"].round
        return single(np.cos(angles)), single(np.sin(angles))


def triples(requests: Sequence[Request]) -> Triples:
    """Every token of a request uses its adapters."""
    rows: list[int] = []
    slots: list[int] = []
    mix: list[float] = []
    first = 0
    for request in requests:
        for row in range(first, first + request.queries):
            for slot, weight in request.mix.items():
                rows.append(row)
                slots.append(slot)
                mix.append(float(np.float32(weight)))
        first += request.queries
    return Triples(
        rows=np.array(rows, dtype=np.int64), slots=np.array(slots, dtype=np.int64), mix=np.array(mix, dtype=np.float64)
    )
