"""A small model of every kind of operator that reads the step, whose results are exact, to be captured and replayed.

All data are small integers, mix weights are powers of two, contexts are powers of two and attention averages over them
with equal scores, so that any right implementation gives the same bits, eagerly and in a graph (tier 1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from polyaccel.backend import (
    AdapterRows,
    DeviceState,
    Event,
    KVSpec,
    PackedAdapter,
    Plan,
    RopeTable,
    RowSet,
    SampleOutput,
    SamplingRow,
    SamplingSpec,
    SiteRequest,
    Slice,
    SlotRange,
    Step,
    StepInput,
    Weight,
    WeightSpec,
)
from polyaccel.backend.support import Static
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.formats import bits_of
from polyaccel_conformance.harness.state import laid_out
from polyaccel_conformance.problems.steps import Paging, build_step
from polyaccel_conformance.trial import Array
from polyaccel_conformance.words import Source

VOCABULARY, HIDDEN, HEAD, POSITIONS = 16, 8, 8, 16
BLOCKS, TABLE, SPARE_SLOT = 24, 4, 7
RANKS = (5, 8, 1)
"""True ranks of the adapters in slots 0, 1, 2, each with a range of eight rank rows."""
RANK_ROWS = 8 * len(RANKS)
ROWS = 4
Triple = tuple[int, int, float]


class MiniModel:
    """Embedding, ``modules`` linears with two slices, rotary, KV writes, attention, logits, sampling.

    Attributes:
        forwards: calls of :meth:`forward`. A graph makes none once it is captured.
        state: what its steps name.
    """

    def __init__(self, bench: Bench, seed: int = 0, *, modules: int = 1, adapters: bool = True) -> None:
        self._bench, self._source, self.forwards = bench, Source(seed), 0
        backend, device = bench.backend, bench.device
        two = (Slice(name="a", n=HEAD), Slice(name="b", n=HEAD))
        specs = [_spec("embed", (Slice(name="table", n=VOCABULARY),), HIDDEN, lookup=True)]
        specs += [_spec(f"mid.{i}", two, HIDDEN) for i in range(modules)]
        specs += [_spec("head", (Slice(name="vocabulary", n=VOCABULARY),), 2 * HEAD)]
        self.weights: dict[str, Weight] = {spec.site: self._weight(spec) for spec in specs}
        block_size = backend.kv_block_size()
        kv = backend.allocate_kv(
            KVSpec(layers=3, kv_heads=1, head_dim=HEAD, dtype=torch.float32, blocks=BLOCKS, block_size=block_size),
            device,
        )
        sampling = backend.allocate_sampling(SamplingSpec(request_slots=SPARE_SLOT + 1, vocabulary=VOCABULARY), device)
        for slot in range(SPARE_SLOT + 1):
            sampling.write(slot, SamplingRow(temperature=0.0))
        self.kv, self.sampling = kv, sampling
        self.adapters = None
        if adapters:
            self.adapters = backend.allocate_adapters(
                self.weights, rank_rows=RANK_ROWS, slots=len(RANKS), device=device
            )
        self.state = DeviceState(kv=kv, adapters=self.adapters, sampling=sampling)
        self._rope = self._make_rope()
        self._still = bench.upload(torch.zeros(ROWS, 1, HEAD))
        self._fill_cache()
        self.plan = self._make_plan(two)
        if adapters:
            for slot in range(len(RANKS)):
                self.load(slot, version=0).synchronize()
        bench.synchronize()

    # -- running -----------------------------------------------------------------------------------------------------

    def begin(self, inputs: StepInput) -> Step:
        return self._bench.begin_step(inputs, self.state)

    def forward(self, step: Step) -> SampleOutput:
        self.forwards += 1
        site, weight, kv = self.plan, self.weights, self.kv
        x = site["embed"][step](weight["embed"], step, 0)
        y = None
        for name in (n for n in weight if n.startswith("mid.")):
            y = site[name][step](x, weight[name], step, "tokens")
        assert isinstance(y, torch.Tensor)
        q, k = (y[:, a : a + HEAD].view(len(y), 1, HEAD) for a in (0, HEAD))
        q, k = site["rope"][step](q, k, self._rope, step)  # type: ignore[misc]
        site["store"][step](k, q, kv, 0, step)
        seen = site["attend"][step](self._still[: len(y)], kv, 1, step, 1.0, None)
        site["store"][step](seen, seen, kv, 2, step)
        rows = site["rows"][step](y, step)
        logits = site["head"][step](rows, weight["head"], step, "logits")
        output = site["sample"][step](logits, self.sampling, step)
        assert isinstance(output, SampleOutput)
        return output

    def observe(self, output: SampleOutput) -> dict[str, Array]:
        """Bits of everything that a step leaves behind."""
        found = {"ids": self._bench.device.download(output.ids).wait().copy()}
        self._bench.synchronize()
        slots = self._bench.upload(torch.arange(self.kv.spec.blocks * self.kv.spec.block_size))
        for layer, what in ((0, "rotated"), (2, "attended")):
            k, v = self.kv.read(layer, slots)
            self._bench.synchronize()
            found[f"{what} keys"], found[f"{what} values"] = bits_of(k).copy(), bits_of(v).copy()
        found["last tokens"] = bits_of(self.sampling.last_tokens()).copy()
        return found

    # -- adapters ----------------------------------------------------------------------------------------------------

    def load(self, slot: int, version: int) -> Event:
        """Put adapter ``version`` into a slot, replacing what is there."""
        assert self.adapters is not None
        where = SlotRange(slot=slot, first_rank_row=8 * slot, rank_rows=8)
        return self.adapters.write(where, self.packed(slot, version))

    def packed(self, slot: int, version: int) -> PackedAdapter:
        """An adapter for every site, of the slot's rank."""
        rank = RANKS[slot]
        entries, _ = laid_out(self.weights.values(), rank)
        parts = [
            self._source.integers(
                f"{entry.site} {entry.slice} {slot} {version}", (rank * (entry.a_shape[1] + entry.b_shape[0]),), -1, 1
            )
            for entry in entries
        ]
        buffer = torch.from_numpy(np.concatenate(parts)).float()
        return PackedAdapter(buffer=buffer, entries=entries, max_rank=rank)

    # -- placing -----------------------------------------------------------------------------------------------------

    def _weight(self, spec: WeightSpec) -> Weight:
        weight = self._bench.backend.allocate_weight(spec, self._bench.device)
        for index, part in enumerate(spec.slices):
            values = self._source.integers(f"{spec.site} {part.name}", (part.n, spec.k), -2, 2)
            weight.write(index, torch.from_numpy(values).float())
        weight.seal()
        return weight

    def _make_rope(self) -> RopeTable:
        """A quarter turn more or less for each position and pair: a signed permutation."""
        turns = self._source.integers("turns", (POSITIONS, HEAD // 2), 0, 3)
        cos, sin = np.array([1, 0, -1, 0])[turns], np.array([0, 1, 0, -1])[turns]
        upload = self._bench.upload
        return RopeTable(
            cos=upload(torch.from_numpy(cos).float()), sin=upload(torch.from_numpy(sin).float()), rotary_dim=HEAD
        )

    def _fill_cache(self) -> None:
        """Layer 1: equal keys, a value of its own for each slot. Layers 0 and 2: zero."""
        slots = torch.arange(self.kv.spec.blocks * self.kv.spec.block_size)
        shape = (len(slots), 1, HEAD)
        zeros = self._bench.upload(torch.zeros(shape))
        values = self._bench.upload(torch.from_numpy(self._source.integers("values", shape, -64, 64)).float())
        on_device = self._bench.upload(slots)
        for layer in range(3):
            self.kv.write(layer, on_device, zeros, values if layer == 1 else zeros)

    def _make_plan(self, two: Sequence[Slice]) -> Plan:
        own: dict[str, Static] = {"dtype": "float32", "quantised": False, "bias": False, "world_size": 1}
        heads: dict[str, Static] = {"heads": 1, "kv_heads": 1, "head_dim": HEAD, "layers": 3}
        linear: dict[str, Static] = {**own, "k": HIDDEN, "slices": (HEAD, HEAD)}
        requests: list[tuple[str, str, dict[str, Static]]] = [
            ("embed", "embedding", {**own, "k": HIDDEN, "slices": (VOCABULARY,), "hidden": HIDDEN}),
            *((name, "column_linear", linear) for name in self.weights if name.startswith("mid.")),
            ("rope", "rotary_embedding", {**own, **heads, "rotary_dim": HEAD, "style": "half"}),
            ("store", "write_kv_cache", {**own, **heads}),
            ("attend", "paged_attention", {**own, **heads, "window": None}),
            ("rows", "select_rows", {**own, "hidden": 2 * HEAD}),
            ("head", "column_linear", {**own, "k": 2 * HEAD, "slices": (VOCABULARY,), "row_set": "logits"}),
            ("sample", "sample", {**own, "vocabulary": VOCABULARY}),
        ]
        plan = Plan(
            self._bench.backend,
            [SiteRequest(site=s, operator=o, static=d, ranges={"tokens": (1, ROWS)}) for s, o, d in requests],
            policy="allow",
        )
        if self.adapters is not None:
            plan.extend(max(RANKS))
        return plan


def _spec(site: str, slices: tuple[Slice, ...], k: int, *, lookup: bool = False) -> WeightSpec:
    return WeightSpec(site=site, slices=slices, k=k, dtype=torch.float32, rank_rows=RANK_ROWS, lookup=lookup)


# -- steps -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeStep:
    """A decode step of the model: ``rows`` sequences, padded to :data:`ROWS`. ``tokens``: ``"given"`` ids, or those
    ``"sampled"`` last. ``adapters``: triples of each row set."""

    name: str
    seed: int
    rows: int = ROWS
    tokens: str = "given"
    adapters: Mapping[RowSet, Sequence[Triple]]

    def inputs(self, block_size: int) -> StepInput:
        source = Source(self.seed)
        contexts = [1 << int(i) for i in source.integers("contexts", (self.rows,), 0, 4)]
        used = sum(-(-context // block_size) for context in contexts)
        paging = Paging.of(source, [1] * self.rows, contexts, block_size, spare=max(BLOCKS - used, 0))
        slots = source.choose("request slots", SPARE_SLOT, self.rows)
        ids = -1 - slots if self.tokens == "sampled" else source.integers("ids", (self.rows,), 0, VOCABULARY - 1)
        made = build_step(
            source,
            [1] * self.rows,
            contexts=contexts,
            paging=paging,
            token_ids=ids,
            request_slots=slots.tolist(),
            adapters={row_set: _rows(triples) for row_set, triples in self.adapters.items() if triples},
            decode=True,
        )
        return _padded(made)


def _rows(triples: Sequence[Triple]) -> AdapterRows:
    ordered = sorted(triples, key=lambda t: (t[1], t[0]))
    return AdapterRows.build(
        np.array([t[0] for t in ordered], dtype=np.int32),
        np.array([t[1] for t in ordered], dtype=np.int32),
        np.array([t[2] for t in ordered], dtype=np.float32),
    )


def _padded(inputs: StepInput) -> StepInput:
    """To all rows of the graph, as the engine does: token 0, nothing stored, a spare request slot; and to a table width
    that is the same for all steps."""
    missing = ROWS - inputs.tokens

    def fill(array: np.ndarray, value: int) -> np.ndarray:
        return np.concatenate((array, np.full((missing, *array.shape[1:]), value, dtype=array.dtype)))

    tables = np.zeros((inputs.sequences, TABLE), dtype=np.int32)
    width = min(TABLE, inputs.block_tables.shape[1])
    tables[:, :width] = inputs.block_tables[:, :width]
    return replace(
        inputs,
        token_ids=fill(inputs.token_ids, 0),
        positions=fill(inputs.positions, 0),
        query_starts=np.arange(ROWS + 1, dtype=np.int32),
        context_lengths=fill(inputs.context_lengths, 0),
        block_tables=fill(tables, 0),
        kv_slots=fill(inputs.kv_slots, -1),
        request_slots=fill(inputs.request_slots, SPARE_SLOT),
        logits_rows=np.arange(ROWS, dtype=np.int32),
        sample_slots=fill(inputs.sample_slots, SPARE_SLOT),
        uniforms=fill(inputs.uniforms, 0),
    )


def replayed_steps(seed: int) -> tuple[DecodeStep, ...]:
    """The step of the capture, and others that differ from it in everything that a graph might have kept."""

    def triples(*found: Triple) -> dict[RowSet, Sequence[Triple]]:
        return {"tokens": found, "logits": found}

    return (
        DecodeStep(name="the captured step", seed=seed, adapters=triples((0, 0, 1.0), (1, 0, 1.0))),
        DecodeStep(name="other data", seed=seed + 1, adapters=triples((0, 0, 1.0), (1, 0, 1.0))),
        DecodeStep(name="sampled tokens", seed=seed + 2, tokens="sampled", adapters=triples((0, 0, 1.0), (1, 0, 1.0))),
        DecodeStep(name="other adapters", seed=seed + 3, adapters=triples((2, 1, 2.0), (3, 2, 0.5))),
        DecodeStep(
            name="more adapter rows",
            seed=seed + 4,
            adapters=triples(*((row, slot, 0.5 * (1 + slot)) for row in range(ROWS) for slot in (0, 1))),
        ),
        DecodeStep(name="fewer rows", seed=seed + 5, rows=2, adapters=triples((1, 1, 1.0))),
        DecodeStep(name="the captured step again", seed=seed, adapters=triples((0, 0, 1.0), (1, 0, 1.0))),
    )
