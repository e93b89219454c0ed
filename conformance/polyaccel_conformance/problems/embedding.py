"""Cases of ``embedding``: lookups of this rank's rows, sampled tokens, adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from polyaccel.backend import DeviceState, SamplingRow, SamplingSpec, SamplingState, TokenClass
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Case, Choice
from polyaccel_conformance.formats import format_of
from polyaccel_conformance.operand import Operand
from polyaccel_conformance.oracle.bounded import Expected
from polyaccel_conformance.oracle.lora import embedding, finish_touched
from polyaccel_conformance.problem import Exactly, Prepared, Problem, ProblemSet
from polyaccel_conformance.problems.adapters import AdaptedProblem
from polyaccel_conformance.problems.apart import token, triples
from polyaccel_conformance.problems.contraction import EXACT_KINDS
from polyaccel_conformance.problems.sgmv import (
    MANY_ROWS,
    ROWS,
    WIDTHS,
    adapter_axes,
    digests_of,
    draw_host_adapters,
    draw_rows,
    mend_adapters,
    triples_of,
)
from polyaccel_conformance.problems.steps import adapter_rows, build_step, row_step
from polyaccel_conformance.problems.weights import HostWeight, tensor_of
from polyaccel_conformance.words import Ints, Source

IDS = ("inside", "mixed", "edges", "sampled", "partly")
"""Token ids: of this rank's rows; of all ranks' rows; first and last rows and their neighbours outside; sampled tokens
named by request slot; every other one named so."""

MARGIN = 9
"""Rows of other ranks behind this one's."""


class EmbeddingProblem(AdaptedProblem):
    """Rows of a table, plus ``mix * B A[:, id]`` for each triple of the tokens."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        source, n, k = self.source, case.dim("n"), case.dim("k")
        start = case.attributes["vocabulary_start"]
        assert isinstance(start, int)
        self.start = start
        self.count = case.dim("tokens")
        self.operands = {}
        self.weight = HostWeight(matrix=Operand.rounded(self._table(n, k), case.dtype), slices=(n,), lookup=True)
        self.adapters = draw_host_adapters(source, case, (n,), k, lookup=True)
        self.rows = draw_rows(source, case, self.count, self.adapters)
        # A lookup alone is exact whatever the data.
        self.exact = case.data in EXACT_KINDS or not len(self.rows)
        self.ids = self._ids(n)

    def _table(self, n: int, k: int) -> np.ndarray:
        source, data = self.source, self.case.data
        if data in EXACT_KINDS:
            return source.integers("table", (n, k), -127, 127)
        table = source.normal("table", (n, k))
        if data == "nonfinite" and n:
            # What clamped ids of other ranks would read.
            table[[0, -1]] = np.nan
            table[n // 2] = np.inf
        return table

    def _ids(self, n: int) -> Ints:
        source, kind, shape = self.source, self.case.structure["ids"], (self.count,)
        if kind == "inside" and n:
            return source.integers("ids", shape, self.start, self.start + n - 1)
        if kind == "edges":
            edges = np.array([self.start, self.start + n - 1, self.start + n, self.start - 1], dtype=np.int64)
            return np.maximum(edges, 0)[np.arange(self.count) % 4]
        return source.integers("ids", shape, 0, self.start + n + MARGIN)

    @property
    def apart(self) -> Sequence[int]:
        return range(self.count)

    def alone(self, row: int) -> Problem:
        other = token(self, row)
        other.count, other.rows, other.ids = 1, triples(self.rows, row), self.ids[row : row + 1]
        return other

    def prepare(self, bench: Bench) -> Prepared:
        case, n = self.case, self.case.dim("n")
        weight, store = self.stored(bench)
        decode = bool(case.structure["decode"])
        ids, sampling = self.ids, None
        if case.structure["ids"] in ("sampled", "partly") and self.count:
            sampling = sampled(bench, self.source, self.ids, self.start + n + MARGIN + 1)
            slots = np.arange(self.count)
            given = (slots % 2 == 0) & (case.structure["ids"] == "partly")
            ids = np.where(given, self.ids, -1 - slots)
        others = None
        if case.structure["others"]:
            rows = self.count if decode else min(self.count, 1)
            others = adapter_rows(Source(case.seed + 1), rows, sorted(self.adapters.adapters), "each")
        inputs = row_step(self.source, self.count, decode=decode, adapters=self.rows, others=others, token_ids=ids)
        state = DeviceState(adapters=store, sampling=sampling)
        static = {**self.weight.static(largest_rank=self.adapters.largest_rank), "vocabulary": n}
        return Prepared(
            arguments={
                "weight": weight,
                "step": bench.begin_step(inputs, state),
                "vocabulary_start": self.start,
            },
            collect=lambda result, _: {"x": tensor_of(result)},
            static=static,
            ranges={"tokens": (self.count, max(self.count, 1))},
            token_class=TokenClass.DECODE if decode else TokenClass.MIXED,
            adapters=inputs.has_adapters,
            again=lambda: {"step": bench.begin_step(inputs, state)},
        )

    def expected(self) -> Mapping[str, Expected | Exactly]:
        x, touched = embedding(
            self.weight.matrix.values.astype(np.float64),
            self.ids,
            self.start,
            self.adapters.oracle(),
            triples_of(self.rows),
            "exact" if self.exact else "random",
        )
        return {"x": finish_touched(x, touched, format_of(self.case.dtype), exact=bool(self.exact))}

    def digests(self) -> dict[str, str]:
        ids = Operand(self.ids, "int64").digest()
        return self.weight.digests() | self.adapters.digests() | digests_of(self.rows) | {"token_ids": ids}


def sampled(bench: Bench, source: Source, ids: Ints, vocabulary: int) -> SamplingState:
    """A state in whose request slot i the token ``ids[i]`` was sampled last: greedily, from logits that say so."""
    count = len(ids)
    state = bench.backend.allocate_sampling(SamplingSpec(request_slots=count, vocabulary=vocabulary), bench.device)
    for slot in range(count):
        state.write(slot, SamplingRow(temperature=0.0))
    logits = torch.zeros((count, vocabulary))
    logits[torch.arange(count), torch.from_numpy(ids)] = 1.0
    inputs = build_step(source, [1] * count, decode=True)
    step = bench.begin_step(inputs, DeviceState(sampling=state))
    prepared = Prepared(
        arguments={},
        collect=lambda result, _: {},
        static={"dtype": "float32", "vocabulary": vocabulary, "world_size": 1},
        ranges={"rows": (count, count)},
        token_class=TokenClass.DECODE,
    )
    bench.resolve("sample", prepared).call(bench.upload(logits), state, step)
    bench.synchronize()
    return state


class EmbeddingProblems(ProblemSet):
    """Whole tables and one rank's part of them."""

    operator = "embedding"

    def axes(self) -> Mapping[str, Sequence[Choice]]:
        return {
            "dtype": ("float32", "bfloat16", "float16"),
            "dims.tokens": ROWS,
            "dims.k": WIDTHS,
            "dims.n": (17, 0, 1, 2, 16, 64, 129),
            "attributes.vocabulary_start": (0, 1, 5, 1000),
            "structure.ids": IDS,
            **adapter_axes(),
            "structure.segments": ("none", *(s for s in adapter_axes()["structure.segments"] if s != "none")),
            "data": ("normal", *EXACT_KINDS, "wide", "nonfinite"),
            "device": ("current", "other"),
            "stream": ("default", "side"),
        }

    def ranges(self) -> Mapping[str, tuple[int, int]]:
        return {"dims.tokens": (0, 70), "dims.k": (1, 150), "dims.n": (0, 150), "dims.rank": (1, 512)}

    def large(self) -> Sequence[Mapping[str, Choice]]:
        return MANY_ROWS

    def mend(self, axes: dict[str, Choice]) -> dict[str, Choice] | None:
        return mend_adapters(axes)

    def problem(self, case: Case) -> Problem:
        return EmbeddingProblem(case)
