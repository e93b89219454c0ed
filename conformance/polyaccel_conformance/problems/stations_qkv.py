"""Cases of ``qkv_rope_cache``."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from polyaccel.backend import OPERATORS, DeviceState, KVCache, RopeTable, StepInput
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Case, Choice
from polyaccel_conformance.formats import FORMATS, Format
from polyaccel_conformance.harness.state import rest_of
from polyaccel_conformance.operand import Operand
from polyaccel_conformance.oracle.bounded import Bounded, Expected, finish
from polyaccel_conformance.oracle.stations import Style, between, turned_heads
from polyaccel_conformance.problem import Exactly, Prepared, Problem, ProblemSet
from polyaccel_conformance.problems.contraction import EXACT_KINDS
from polyaccel_conformance.problems.kv_cache import canonical, fill, kv_spec, stored
from polyaccel_conformance.problems.rows import coarsest
from polyaccel_conformance.problems.stations import LARGE, StationProblem, mend_station, station_axes
from polyaccel_conformance.problems.steps import BLOCK_ORDERS, Paging, adapter_rows, build_step
from polyaccel_conformance.problems.weights import tensor_of
from polyaccel_conformance.words import Floats, Source

LAYERS = 2
WATCHED = 6
"""Slots that the step does not write to, which are compared."""


class QkvRopeCacheProblem(StationProblem):
    """q, normed and turned, of each token; k and v are read back from the cache, with some slots that must not change.

    Exact kinds have cos and sin of 0 and +-1, one of them 0: a signed permutation; they have no norms.
    """

    only_q = False

    def draw(self) -> None:
        case, source = self.case, self.source
        self._drawn: dict[tuple[str, int], torch.Tensor] = {}
        heads, kv_heads, head_dim = case.dim("heads"), case.dim("kv_heads"), case.dim("head_dim")
        self.slices = (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)
        self.operands = {"x": self.plain(self.slices, case.dim("k"), ends=False)}
        self.normed = bool(case.structure["q_norm_k_norm"])
        if self.normed:
            for name in ("q_norm", "k_norm"):
                weight = 1 + 0.25 * source.normal(name, (head_dim,))
                self.operands[name] = Operand.rounded(weight, case.dtype)
        tokens = self.count
        self.queries = [1] * tokens if case.structure["decode"] else [tokens - tokens // 3, tokens // 3]
        older = source.integers("older", (len(self.queries),), 0, 20).tolist()
        self.contexts = [q + more for q, more in zip(self.queries, older, strict=True)]
        self.positions = source.integers("positions", (tokens,), 0, 30)
        self.unstored = np.flatnonzero(source.integers("unstored", (tokens,), 0, 4) == 0)
        self.kept = np.setdiff1d(np.arange(tokens), self.unstored)
        shape = (31, case.dim("rotary_dim") // 2)
        if self.exact:
            quarter = source.integers("quarter", shape, 0, 3)
            cos, sin = np.array([1.0, 0.0, -1.0, 0.0])[quarter], np.array([0.0, 1.0, 0.0, -1.0])[quarter]
        else:
            # Rational points of the unit circle, so that no libm is needed.
            t = 2 * source.uniform("angle", shape) - 1
            cos, sin = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
        self.cos, self.sin = Operand.rounded(cos, "float32"), Operand.rounded(sin, "float32")

    def alone(self, row: int) -> Problem:
        """Only q: k and v have rows of their own in the cache."""
        other = super().alone(row)
        assert isinstance(other, QkvRopeCacheProblem)
        other.queries, other.contexts = [1], [1]
        other.positions = self.positions[row : row + 1]
        other.unstored, other.kept = np.zeros(0, dtype=np.int64), np.arange(1)
        other.only_q = True
        return other

    @property
    def style(self) -> Style:
        return "interleaved" if self.case.structure["style"] == "interleaved" else "half"

    @property
    def layer(self) -> int:
        layer = self.case.attributes["layer"]
        assert isinstance(layer, int)
        return layer

    # -- placing -----------------------------------------------------------------------------------------------------

    def step_input(self, paging: Paging) -> StepInput:
        decode = bool(self.case.structure["decode"])
        triples = {"tokens": self.rows} if len(self.rows) else {}
        if self.case.structure["others"]:
            rows = self.count if decode else min(self.count, 1)
            other = adapter_rows(Source(self.case.seed + 1), rows, sorted(self.adapters.adapters), "each")
            triples |= {"logits": other} if len(other) else {}
        return build_step(
            self.source,
            self.queries,
            contexts=self.contexts,
            paging=paging,
            positions=self.positions,
            unstored=self.unstored.tolist(),
            adapters=triples,  # type: ignore[arg-type]
            decode=decode,
        )

    def _paging(self, bench: Bench) -> Paging:
        size, order = bench.backend.kv_block_size(), str(self.case.structure["blocks"])
        return Paging.of(self.source, self.queries, self.contexts, size, order)

    def prepare(self, bench: Bench) -> Prepared:
        case, head_dim = self.case, self.case.dim("head_dim")
        paging = self._paging(bench)
        inputs = self.step_input(paging)
        weight, store = self.stored(bench)
        kv = bench.backend.allocate_kv(kv_spec(case, paging, LAYERS), bench.device)
        written = inputs.kv_slots[self.kept]
        free = rest_of(paging.blocks * paging.block_size, inputs.kv_slots)
        watched = free[:: max(len(free) // WATCHED, 1)][:WATCHED]
        state = DeviceState(adapters=store, kv=kv)
        if not self.only_q:
            self._fill(bench, kv, watched, written)
        rope = RopeTable(
            cos=bench.upload(self.cos.torch()),
            sin=bench.upload(self.sin.torch()),
            rotary_dim=case.dim("rotary_dim"),
            style=self.style,
        )

        def collect(result: object, _: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
            if self.only_q:
                return {"q": tensor_of(result)}
            both = stored(bench, kv, self.layer, np.concatenate([written, watched]))
            k, v = (part[: len(written)] for part in both)
            own = tuple(part[len(written) :] for part in both)
            other = stored(bench, kv, 1 - self.layer, written)
            unchanged = canonical(torch.cat([part.reshape(-1) for part in (*own, *other)]))
            return {"q": tensor_of(result), "k": k, "v": v, "rest of the cache": unchanged}

        erased = self._filling("other layer", len(written))

        def again() -> Mapping[str, object]:
            # What an earlier call stored must not pass for what the next one stores.
            fill(bench, kv, self.layer, written, *erased)
            return {"step": bench.begin_step(inputs, state)}

        return Prepared(
            arguments={
                "weight": weight,
                "step": bench.begin_step(inputs, state),
                "rope": rope,
                "eps": case.attributes["eps"],
                "kv": kv,
                "layer": self.layer,
                "head_dim": head_dim,
            },
            collect=collect,
            static={
                **self.weight.static(largest_rank=self.adapters.largest_rank),
                "heads": case.dim("heads"),
                "kv_heads": case.dim("kv_heads"),
                "head_dim": head_dim,
                "qk_norm": self.normed,
                "rotary_dim": case.dim("rotary_dim"),
                "rope_style": self.style,
            },
            ranges={"tokens": (self.count, max(self.count, 1))},
            token_class=inputs.token_class,
            adapters=inputs.has_adapters,
            again=again,
        )

    def _fill(self, bench: Bench, kv: KVCache, watched: np.ndarray, written: np.ndarray) -> None:
        """What the cache holds in this layer's watched slots and in the other layer's written ones."""
        for layer, slots, name in ((self.layer, watched, "watched"), (1 - self.layer, written, "other layer")):
            k, v = self._filling(name, len(slots))
            fill(bench, kv, layer, slots, k, v)

    def _filling(self, name: str, slots: int) -> torch.Tensor:
        """``[2, slots, kv_heads, head_dim]`` small integers, which every format holds."""
        values = self._drawn.get((name, self.count))
        if values is None:
            shape = (2, WATCHED + self.count, self.case.dim("kv_heads"), self.case.dim("head_dim"))
            values = torch.from_numpy(self.source.integers(name, shape, -120, 120))
            values = self._drawn[name, self.count] = values.to(FORMATS[self.case.dtype].torch)
        return values[:, :slots]

    # -- expecting ---------------------------------------------------------------------------------------------------

    def expected(self) -> Mapping[str, Expected | Exactly]:
        with np.errstate(invalid="ignore", over="ignore"):
            y = self.product()
            starts, head_dim = self.weight.starts, self.case.dim("head_dim")
            q, k, v = (
                y[:, begin:end].reshape(self.count, (end - begin) // head_dim, head_dim)
                for begin, end in itertools.pairwise(starts)
            )
            found = {"q": self._turned(q, "q_norm"), "k": self._turned(k, "k_norm")[self.kept]}
            found["v"] = between(v, self.format, self.order)[self.kept]
            expected: dict[str, Expected | Exactly] = {
                name: finish(part, self.format, exact=bool(self.exact)) for name, part in found.items()
            }
        rest = [self._filling("watched", WATCHED), self._filling("other layer", len(self.kept))]
        bits = np.concatenate([canonical(part).reshape(-1).numpy() for pair in rest for part in pair])
        return {**expected, "rest of the cache": Exactly(values=bits.astype(np.int64))}

    def _turned(self, y: Bounded, name: str) -> Bounded:
        spec, eps = OPERATORS["rms_norm"], self.case.attributes["eps"]
        assert isinstance(eps, float)
        norm: tuple[Floats, float, Format, int] | None = None
        if self.normed:
            kept = coarsest(spec, "normed", self.case.dtype)
            norm = (self.values(name), eps, kept, spec.numerics.ulps["rsqrt"])
        cos = self.cos.values.astype(np.float64)[self.positions]
        sin = self.sin.values.astype(np.float64)[self.positions]
        return turned_heads(y, cos, sin, self.style, self.format, norm, self.order)

    def digests(self) -> dict[str, str]:
        positions = Operand(self.positions, "int64").digest()
        return super().digests() | {"cos": self.cos.digest(), "sin": self.sin.digest(), "positions": positions}


class QkvRopeCacheProblems(ProblemSet):
    """Any grouping of heads, whole and partial rotation, both styles, with and without norms."""

    operator = "qkv_rope_cache"

    def axes(self) -> Mapping[str, Sequence[Choice]]:
        return {
            **station_axes(self.operator, {"q_norm": 1, "k_norm": 1}),
            "dims.k": (16, 1, 7, 33),
            "dims.heads": (2, 1, 3, 6),
            "dims.kv_heads": (1, 2),
            "dims.head_dim": (16, 2, 33, 64),
            "dims.rotary_dim": (64, 2, 8),
            "attributes.eps": (1e-5, 1e-6),
            "attributes.layer": (0, LAYERS - 1),
            "structure.q_norm_k_norm": (False, True),
            "structure.style": ("half", "interleaved"),
            "structure.blocks": BLOCK_ORDERS,
        }

    def ranges(self) -> Mapping[str, tuple[int, int]]:
        return {"dims.tokens": (0, 20), "dims.k": (1, 70), "dims.heads": (1, 8), "dims.rank": (1, 512)}

    def large(self) -> Sequence[Mapping[str, Choice]]:
        return LARGE

    def mend(self, axes: dict[str, Choice]) -> dict[str, Choice] | None:
        tokens, head_dim, rotary_dim = (axes[f"dims.{name}"] for name in ("tokens", "head_dim", "rotary_dim"))
        assert isinstance(tokens, int)
        assert isinstance(head_dim, int)
        assert isinstance(rotary_dim, int)
        rotary_dim = min(rotary_dim, head_dim)
        axes["dims.rotary_dim"] = rotary_dim - rotary_dim % 2
        if axes["structure.decode"]:
            # Every sequence has blocks of its own.
            axes["dims.tokens"] = min(tokens, 7)
        if axes["data"] in EXACT_KINDS:
            axes["structure.q_norm_k_norm"] = False
            axes["structure.weight"] = "float"
        rank, heads = axes["dims.rank"], axes["dims.heads"]
        assert isinstance(rank, int)
        assert isinstance(heads, int)
        if rank > 64 and head_dim * heads > 128:
            axes["dims.heads"] = max(128 // head_dim, 1)
        return mend_station(axes)

    def problem(self, case: Case) -> Problem:
        return QkvRopeCacheProblem(case)
