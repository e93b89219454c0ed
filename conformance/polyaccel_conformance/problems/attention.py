"""Cases of ``paged_attention`` and ``dense_attention``; the data are those of :mod:`attention_data`."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from polyaccel.backend import DeviceState, StepInput, TokenClass
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Case, Choice
from polyaccel_conformance.formats import FORMATS, format_of
from polyaccel_conformance.harness.state import rest_of
from polyaccel_conformance.operand import Operand
from polyaccel_conformance.oracle.attention import attention
from polyaccel_conformance.oracle.bounded import Bounded, Expected, concatenate, finish
from polyaccel_conformance.problem import Exactly, Prepared, Problem, ProblemSet
from polyaccel_conformance.problems.apart import token
from polyaccel_conformance.problems.attention_data import EXACT, KINDS, AttentionData, Keys, with_prefix
from polyaccel_conformance.problems.kv_cache import fill, kv_spec
from polyaccel_conformance.problems.rows import coarsest
from polyaccel_conformance.problems.steps import BLOCK_ORDERS, Paging, build_step
from polyaccel_conformance.problems.weights import tensor_of

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

LAYERS = 3
PHASES = ("prefill", "decode", "chunked", "mixed", "padded")
UNREAD = ("nan", "inf", "huge", "stale")
"""What lies where no query may read: NaN; infinity; huge values under keys of zero, whose scores are like the others';
the same, but keys before a window's first one are as they were written."""

# Queries x keys x heads, the same times head_dim, and elements of keys, of one case.
WORK = 16_000
PRODUCTS = 1_000_000
ELEMENTS = 40_000
LONGEST_CHUNK = 33


class AttentionProblem(Problem):
    """What both operators share: queries of several sequences joined, and the oracle of each."""

    longest: str
    data: AttentionData
    sequences: list[Keys]
    visible: list[Mask]

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.exact = case.data == EXACT
        scale = case.attributes["scale"]
        assert isinstance(scale, float)
        self.scale = scale
        self.data = AttentionData(self, scale, case.dim(self.longest))

    def poison_query(self, q: Floats) -> Floats:
        """One NaN in one head of one query: no other head and no other query may show it."""
        if self.case.data == "nonfinite" and q.size:
            q = q.copy()
            q.reshape(-1)[int(self.source.integers("poisoned", (1,), 0, q.size - 1)[0])] = np.nan
        return q

    def attend(self, q: Floats, k: Floats, v: Floats, visible: Mask) -> Bounded:
        """The oracle of one sequence."""
        ulps = self.spec.numerics.ulps
        return attention(
            q,
            k,
            v,
            visible,
            self.scale,
            p_format=coarsest(self.spec, "p", self.case.dtype),
            exp_ulps=ulps["exp"],
            divide_ulps=ulps["divide"],
        )

    def joined(self, parts: list[Bounded], q: Floats) -> Mapping[str, Expected | Exactly]:
        empty = Bounded.exact(np.zeros((0, *q.shape[1:])))
        return {"out": finish(concatenate([empty, *parts], 0), format_of(self.case.dtype), exact=bool(self.exact))}

    def static(self) -> dict[str, int | float | str | bool | None]:
        return {
            "dtype": self.case.dtype,
            "heads": self.data.heads,
            "kv_heads": self.data.kv_heads,
            "head_dim": self.data.head_dim,
            "scale": self.scale,
            "world_size": 1,
        }


class PagedAttentionProblem(AttentionProblem):
    """Sequences of one phase, or of all; what no query may read is poisoned."""

    longest = "context"

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        window = case.attributes["window"]
        assert window is None or isinstance(window, int)
        self.window = window
        self.counts, self.contexts = self._lengths()
        self.padding = 2 if case.structure["phase"] == "padded" else 0
        self.sequences, self.visible, queries = [], [], []
        shared = case.structure["blocks"] == "shared"
        common = self.data.keys("common", max(self.contexts, default=0) if shared else 0)
        for i, (count, context) in enumerate(zip(self.counts, self.contexts, strict=True)):
            own = self.data.keys(f"{i}", context)
            if shared:
                # What a prefix cache may share: everything that this step does not write.
                own = with_prefix(own, common, context - count)
            self.sequences.append(own)
            self.visible.append(causal(count, context, window))
            queries.append(self.data.queries(f"{i}", count, own, self.visible[-1]))
        shape = (self.padding, self.data.heads, self.data.head_dim)
        queries.append(format_of(case.dtype).round(self.source.normal("padding", shape)))
        self.operands = {"q": Operand.rounded(self.poison_query(np.concatenate(queries)), case.dtype)}

    def _lengths(self) -> tuple[list[int], list[int]]:
        """Queries and contexts of the sequences; the first has the case's context, the others are any shorter."""
        case, source = self.case, self.source
        sequences, longest, phase = case.dim("sequences"), case.dim("context"), case.structure["phase"]
        contexts = [longest, *source.integers("contexts", (max(sequences - 1, 0),), 1, longest).tolist()][:sequences]
        chunks = source.integers("chunks", (sequences,), 1, 1 << 20).tolist()
        kinds = source.integers("phases", (sequences,), 0, 3).tolist()
        counts = []
        for context, chunk, kind in zip(contexts, chunks, kinds, strict=True):
            part = 1 + chunk % min(context, LONGEST_CHUNK)
            by_kind = (1, context, part, part)[kind]
            counts.append({"prefill": context, "chunked": part, "mixed": by_kind}.get(str(phase), 1))
        return counts, contexts

    def prepare(self, bench: Bench) -> Prepared:
        case, size = self.case, bench.backend.kv_block_size()
        order = str(case.structure["blocks"])
        paging = Paging.of(self.source, self.counts, self.contexts, size, order)
        decode = case.structure["phase"] in ("decode", "padded")
        step = build_step(self.source, self.counts, contexts=self.contexts, paging=paging, decode=decode)
        if self.padding:
            step = padded(step, self.padding)
        kv = bench.backend.allocate_kv(kv_spec(case, paging, LAYERS), bench.device)
        layer = case.attributes["layer"]
        assert isinstance(layer, int)
        slots, k, v = self._placed(paging)
        fill(bench, kv, layer, slots, Operand(k, case.dtype).torch(), Operand(v, case.dtype).torch())
        unread = rest_of(paging.blocks * size, slots)
        dtype = FORMATS[case.dtype].torch
        poison = (
            torch.full((len(unread), *k.shape[1:]), value, dtype=dtype)
            for value in unread_values(str(case.structure["unread"]), FORMATS[case.dtype].max)
        )
        fill(bench, kv, layer, unread, *poison)
        tokens = len(self.operands["q"].values)
        return Prepared(
            arguments={
                "kv": kv,
                "layer": layer,
                "step": bench.begin_step(step, DeviceState(kv=kv)),
                "scale": self.scale,
                "window": self.window,
            },
            collect=lambda result, _: {"out": tensor_of(result)},
            static={**self.static(), "window": self.window},
            ranges={
                "tokens": (tokens, max(tokens, 1)),
                "context": (0, max(self.contexts, default=0)),
            },
            token_class=TokenClass.DECODE if decode else TokenClass.MIXED,
            again=lambda: {"step": bench.begin_step(step, DeviceState(kv=kv))},
        )

    @property
    def apart(self) -> Sequence[int]:
        """The first query of each sequence."""
        ends = np.cumsum([0, *self.counts])
        return [int(first) for first, count in zip(ends[:-1], self.counts, strict=True) if count]

    def alone(self, row: int) -> Problem:
        i = int(np.searchsorted(np.cumsum(self.counts), row, side="right"))
        other = token(self, row, self.counts[i])
        other.counts, other.contexts, other.padding = [self.counts[i]], [self.contexts[i]], 0
        other.sequences, other.visible = [self.sequences[i]], [self.visible[i]]
        return other

    def _placed(self, paging: Paging) -> tuple[Ints, Floats, Floats]:
        """The slots that some query reads, each once, with their keys and values; for ``stale`` also the sequences'
        older slots, outside of every window."""
        stale = self.case.structure["unread"] == "stale"
        shape = (0, self.data.kv_heads, self.data.head_dim)
        slots, ks, vs = [np.zeros(0, dtype=np.int64)], [np.zeros(shape)], [np.zeros(shape)]
        for i, (keys, visible) in enumerate(zip(self.sequences, self.visible, strict=True)):
            read = np.flatnonzero(visible.any(axis=0) | (stale and len(visible) > 0))
            slots.append(paging.slots(i, 0, visible.shape[1])[read])
            ks.append(keys.k[read])
            vs.append(keys.v[read])
        found, first = np.unique(np.concatenate(slots), return_index=True)
        return found, np.concatenate(ks)[first], np.concatenate(vs)[first]

    def expected(self) -> Mapping[str, Expected | Exactly]:
        q = self.operands["q"].values.astype(np.float64)
        parts, first = [], 0
        for keys, visible in zip(self.sequences, self.visible, strict=True):
            end = first + len(visible)
            parts.append(self.attend(q[first:end], keys.k, keys.v, visible))
            first = end
        if self.padding:
            parts.append(Bounded.exact(np.zeros((self.padding, *q.shape[1:]))))
        return self.joined(parts, q)

    def digests(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for i, keys in enumerate(self.sequences):
            found |= {
                f"k{i}": Operand(keys.k, self.case.dtype).digest(),
                f"v{i}": Operand(keys.v, self.case.dtype).digest(),
            }
        return super().digests() | found


class DenseAttentionProblem(AttentionProblem):
    """Segments of tokens that see each other, or only what came before."""

    longest = "tokens"

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.starts = self._starts()
        self.causal = bool(case.attributes["causal"])
        self.sequences, self.visible, queries = [], [], []
        for i, (begin, end) in enumerate(itertools.pairwise(self.starts)):
            n = end - begin
            self.sequences.append(self.data.keys(f"{i}", n))
            self.visible.append(causal(n, n, None) if self.causal else np.ones((n, n), dtype=np.bool_))
            queries.append(self.data.queries(f"{i}", n, self.sequences[-1], self.visible[-1]))
        before, after = outside(self.starts, case.dim("tokens"))
        rest = {name: self._outside(name, before, after) for name in ("q", "k", "v")}
        joined = {
            "q": [rest["q"][0], *queries, rest["q"][1]],
            "k": [rest["k"][0], *(s.k for s in self.sequences), rest["k"][1]],
            "v": [rest["v"][0], *(s.v for s in self.sequences), rest["v"][1]],
        }
        arrays = {name: np.concatenate(parts) for name, parts in joined.items()}
        arrays["q"] = self.poison_query(arrays["q"])
        self.operands = {name: Operand.rounded(x, case.dtype) for name, x in arrays.items()}

    @property
    def apart(self) -> Sequence[int]:
        """The first token of each segment."""
        return [begin for begin, end in itertools.pairwise(self.starts) if end > begin]

    def alone(self, row: int) -> Problem:
        i = next(i for i, (begin, end) in enumerate(itertools.pairwise(self.starts)) if begin == row < end)
        other = token(self, row, self.starts[i + 1] - row)
        other.starts = [0, self.starts[i + 1] - row]
        other.sequences, other.visible = [self.sequences[i]], [self.visible[i]]
        return other

    def _outside(self, name: str, before: int, after: int) -> tuple[Floats, Floats]:
        """Tokens of no segment: their keys and values are never read."""
        heads = self.data.heads if name == "q" else self.data.kv_heads
        key, held = unread_values(str(self.case.structure["unread"]), format_of(self.case.dtype).max)
        value = {"q": 1.0, "k": key, "v": held}[name]
        first, last = (np.full((count, heads, self.data.head_dim), value) for count in (before, after))
        return first, last

    def _starts(self) -> list[int]:
        tokens, pattern = self.case.dim("tokens"), self.case.attributes["starts"]
        if pattern == "one":
            return [0, tokens]
        if pattern == "each":
            return list(range(tokens + 1))
        count = min(3, tokens + 1)
        cuts = sorted(self.source.choose("cuts", tokens + 1, count).tolist())
        if pattern == "several":
            return [0, *cuts, tokens]
        if pattern == "empty":
            return [0, *np.repeat(cuts, 2).tolist(), tokens]
        return cuts

    def prepare(self, bench: Bench) -> Prepared:
        tokens = self.case.dim("tokens")
        return Prepared(
            arguments={"starts": self.starts, "scale": self.scale, "causal": self.causal},
            collect=lambda result, _: {"out": tensor_of(result)},
            static={**self.static(), "causal": self.causal},
            ranges={"tokens": (tokens, max(tokens, 1))},
        )

    def expected(self) -> Mapping[str, Expected | Exactly]:
        q, k, v = (self.operands[name].values.astype(np.float64) for name in ("q", "k", "v"))
        before, after = outside(self.starts, len(q))
        zeros = [Bounded.exact(np.zeros((count, *q.shape[1:]))) for count in (before, after)]
        parts = [
            self.attend(q[begin:end], k[begin:end], v[begin:end], visible)
            for (begin, end), visible in zip(itertools.pairwise(self.starts), self.visible, strict=True)
        ]
        return self.joined([zeros[0], *parts, zeros[1]], q)


class PagedAttentionProblems(ProblemSet):
    """Prefill, its chunks and decode, alone and together, in blocks of the backend's size."""

    operator = "paged_attention"

    def axes(self) -> Mapping[str, Sequence[Choice]]:
        return {
            "dtype": ("float32", "bfloat16", "float16"),
            "dims.sequences": (1, 0, 2, 3, 4),
            "dims.context": (17, 1, 2, 16, 33, 64, 129, 300, 600),
            "dims.kv_heads": (1, 2, 3),
            "dims.group": (1, 2, 3, 4, 8),
            "dims.head_dim": (64, 80, 128, 256, 11, 33),
            "attributes.layer": (0, 1, LAYERS - 1),
            "attributes.scale": (0.125, 0.0883883461356163, 0.3, 1.0),
            "attributes.window": (None, 1, 2, 16, 31, 4096),
            "layouts.q": ("contiguous", "row_padded", "offset"),
            "structure.phase": PHASES,
            "structure.blocks": BLOCK_ORDERS,
            "structure.unread": UNREAD,
            "data": KINDS,
            "device": ("current", "other"),
            "stream": ("default", "side"),
        }

    def ranges(self) -> Mapping[str, tuple[int, int]]:
        return {
            "dims.sequences": (0, 6),
            "dims.context": (1, 700),
            "dims.kv_heads": (1, 4),
            "dims.group": (1, 8),
            "dims.head_dim": (1, 256),
        }

    def mend(self, axes: dict[str, Choice]) -> dict[str, Choice] | None:
        if axes["data"] == EXACT:
            fit_selection(axes, "dims.context")
        # Decode steps are cheap, and so are chunks.
        most = {"decode": 1, "padded": 1, "chunked": LONGEST_CHUNK}.get(str(axes["structure.phase"]), 1 << 20)
        while True:
            size = sizes(axes, "sequences", "context", "kv_heads", "group")
            queries = min(size["context"], most)
            work = size["sequences"] * queries * size["context"] * size["kv_heads"] * size["group"]
            head_dim = sizes(axes, "head_dim")["head_dim"]
            if work * head_dim > PRODUCTS and _reduce(axes, ("sequences", 1), ("head_dim", 64)):
                continue
            if work > WORK and _reduce(axes, ("sequences", 1), ("group", 1), ("kv_heads", 1), ("context", 300)):
                continue
            elements = size["sequences"] * size["context"] * size["kv_heads"] * head_dim
            if elements <= ELEMENTS or not _reduce(axes, ("sequences", 2), ("kv_heads", 1)):
                return axes

    def problem(self, case: Case) -> Problem:
        return PagedAttentionProblem(case)


class DenseAttentionProblems(ProblemSet):
    """One, several, empty and single-token segments, and tokens of none."""

    operator = "dense_attention"

    def axes(self) -> Mapping[str, Sequence[Choice]]:
        return {
            "dtype": ("float32", "bfloat16", "float16"),
            "dims.tokens": (17, 0, 1, 2, 16, 33, 66),
            "dims.kv_heads": (1, 2, 3),
            "dims.group": (1, 2, 4),
            "dims.head_dim": (64, 80, 128, 256, 11, 33),
            "attributes.starts": ("one", "several", "empty", "each", "inside"),
            "attributes.scale": (0.125, 0.0883883461356163, 0.3, 1.0),
            "attributes.causal": (True, False),
            "layouts.q": ("contiguous", "row_padded", "offset"),
            "layouts.k": ("contiguous", "row_padded", "offset"),
            "layouts.v": ("contiguous", "row_padded", "offset"),
            "structure.unread": UNREAD,
            "data": KINDS,
            "device": ("current", "other"),
            "stream": ("default", "side"),
        }

    def ranges(self) -> Mapping[str, tuple[int, int]]:
        return {"dims.tokens": (0, 130), "dims.kv_heads": (1, 4), "dims.group": (1, 8), "dims.head_dim": (1, 256)}

    def large(self) -> Sequence[Mapping[str, Choice]]:
        """Beyond every tile of queries or keys."""
        sizes: dict[str, Choice] = {"dims.tokens": 130, "dims.head_dim": 33}
        return (
            {**sizes, "dtype": "float32", "data": "normal"},
            {**sizes, "dtype": "bfloat16", "data": EXACT, "attributes.starts": "several"},
            {
                **sizes,
                "dtype": "float16",
                "data": "positive",
                "attributes.causal": False,
                "attributes.starts": "inside",
            },
        )

    def mend(self, axes: dict[str, Choice]) -> dict[str, Choice] | None:
        if axes["data"] == EXACT:
            fit_selection(axes, "dims.tokens")
        if axes["attributes.starts"] == "each":
            axes["dims.tokens"] = min(sizes(axes, "tokens")["tokens"], 4)
        while True:
            size = sizes(axes, "tokens", "kv_heads", "group")
            work = size["tokens"] ** 2 * size["kv_heads"] * size["group"]
            if work * sizes(axes, "head_dim")["head_dim"] > PRODUCTS and _reduce(axes, ("head_dim", 64)):
                continue
            if work <= WORK or not _reduce(axes, ("group", 1), ("kv_heads", 1)):
                return axes

    def problem(self, case: Case) -> Problem:
        return DenseAttentionProblem(case)


def causal(queries: int, context: int, window: int | None) -> Mask:
    """``[queries, context]``: the queries are the last ones of the context."""
    i = np.arange(context - queries, context)[:, None]
    j = np.arange(context)[None, :]
    visible: Mask = (j <= i) & (j > i - (context + 1 if window is None else window))
    return visible


def unread_values(kind: str, largest: float) -> tuple[float, float]:
    """Key and value where no query may read."""
    if kind in ("nan", "inf"):
        return float(kind), float(kind)
    return 0.0, largest / 2


def padded(step: StepInput, rows: int) -> StepInput:
    """A decode step with rows of padding, as the engine sends it to a graph: one token each, no context, no slot."""

    def extended(array: npt.NDArray[np.generic], value: int = 0) -> npt.NDArray[np.generic]:
        return np.concatenate((array, np.full((rows, *array.shape[1:]), value, dtype=array.dtype)))

    tokens = step.tokens
    return replace(
        step,
        token_ids=extended(step.token_ids),
        positions=extended(step.positions),
        query_starts=np.arange(tokens + rows + 1, dtype=np.int32),
        context_lengths=extended(step.context_lengths),
        block_tables=extended(step.block_tables),
        kv_slots=extended(step.kv_slots, -1),
        request_slots=extended(step.request_slots),
        logits_rows=np.arange(tokens + rows, dtype=np.int32),
        sample_slots=extended(step.sample_slots),
        uniforms=extended(step.uniforms),
    )


def fit_selection(axes: dict[str, Choice], context: str) -> None:
    """Room for the code in every head, and a scale that is a power of two."""
    head_dim, scale = axes["dims.head_dim"], axes["attributes.scale"]
    assert isinstance(head_dim, int)
    assert isinstance(scale, float)
    axes["dims.head_dim"] = head_dim = max(head_dim, 3)
    longest = axes[context]
    assert isinstance(longest, int)
    axes[context] = min(longest, 2 ** min(head_dim - 1, 12))
    axes["attributes.scale"] = float(2.0 ** round(float(np.log2(scale))))


def sizes(axes: Mapping[str, Choice], *names: str) -> dict[str, int]:
    """Dimensions by name."""
    found = {}
    for name in names:
        value = axes[f"dims.{name}"]
        assert isinstance(value, int)
        found[name] = value
    return found


def outside(starts: Sequence[int], tokens: int) -> tuple[int, int]:
    """Tokens before the first and after the last segment."""
    return starts[0], tokens - starts[-1]


def _reduce(axes: dict[str, Choice], *limits: tuple[str, int]) -> bool:
    """Lower the first dimension that is above its limit."""
    for name, most in limits:
        value = axes[f"dims.{name}"]
        if isinstance(value, int) and value > most:
            axes[f"dims.{name}"] = most
            return True
    return False
