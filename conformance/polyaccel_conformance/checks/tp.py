"""Whether an adapter does the same at every world size.

Founding case: padding overwrote the rank that the scale was computed from, so that k, v and o were scaled 4 times too
weak with 4 ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import torch

from polyaccel.backend import AdapterRows, AdapterStore, DeviceState, PackedAdapter, SlotRange
from polyaccel_conformance.bench import Bench, call_by_name
from polyaccel_conformance.case import Case, Choice
from polyaccel_conformance.check import Check, Control, Failure
from polyaccel_conformance.checks.comm import RankCheck, control_case, ranked
from polyaccel_conformance.formats import format_of, from_torch
from polyaccel_conformance.models.adapter_cut import FEATURES, ROW_PARALLEL, ModuleCut, cut_module, write_adapter
from polyaccel_conformance.multi.bench import Call, RankBench, rank_bench
from polyaccel_conformance.multi.problem import RankedProblem
from polyaccel_conformance.operand import Operand
from polyaccel_conformance.problem import Prepared
from polyaccel_conformance.problems.shares import RANKS
from polyaccel_conformance.problems.steps import row_step
from polyaccel_conformance.trial import Trial
from polyaccel_conformance.words import Source

Floats = npt.NDArray[np.float64]

TOKENS = 3
FIRST, SECOND, SLOTS = 0, 2, 3
LOADS = ("loaded", "loaded twice", "after a reload")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Adapter:
    """``a: [rank, in]``, ``b: [out, rank]``, integers; ``alpha`` is a power of two times the rank, and not the rank."""

    a: Floats
    b: Floats
    alpha: float

    @classmethod
    def of(cls, case: Case) -> Adapter:
        """Entries that are few and small, so that every sum over any cut is exact in 8 bits."""
        source, rank = Source(case.seed), RANKS[str(case.structure["ranks"])][0]
        out_features, in_features = FEATURES[str(case.structure["module"])]
        a, b = np.zeros((rank, in_features)), np.zeros((out_features, rank))
        for entry in range(4):
            column = source.integers(f"a {entry}", (rank,), 0, in_features - 1)
            a[np.arange(rank), column] = 1 - 2 * source.integers(f"a sign {entry}", (rank,), 0, 1)
        column = source.integers("b", (out_features,), 0, rank - 1)
        b[np.arange(out_features), column] = source.integers("b value", (out_features,), 1, 3)
        return cls(a=a, b=b, alpha=float(rank * (2, 4)[case.seed % 2]))

    @property
    def rank(self) -> int:
        return len(self.a)

    def delta(self, x: Floats) -> Floats:
        """``[tokens, out]``: what it adds, whole."""
        y: Floats = x @ self.a.T @ self.b.T * (self.alpha / self.rank)
        return y


class TpDeltaEqual(RankCheck):
    """The deltas of all ranks' shards, summed or joined, are that of the whole adapter, bit by bit; as is that of a
    world of one. The adapter is a file that the engine reads, matches, cuts and packs."""

    name = "lora.tp_delta_equal"

    def concerns(self, case: Case, problem: RankedProblem) -> bool:
        return case.structure.get("module", "none") != "none"

    def run(self, trial: Trial) -> Failure | None:
        bench, case = rank_bench(trial.bench), ranked(trial.problem).case
        adapter, module = Adapter.of(case), str(case.structure["module"])
        folder = bench.folder / f"adapter-{case.key}-{bench.rank}"
        write_adapter(folder, module, adapter.a, adapter.b, adapter.alpha)
        x = Source(case.seed).integers("x", (TOKENS, FEATURES[module][1]), -2, 2).astype(np.float64)
        wanted = adapter.delta(x)
        wrong = self._compare(_deltas(bench.alone(), folder, module, adapter, x, case.dtype), wanted, "world 1")
        found = _deltas(bench, folder, module, adapter, x, case.dtype)
        return self._compare(found, wanted, f"world {bench.world_size}") or wrong

    def _compare(self, found: Mapping[str, Floats | str], wanted: Floats, where: str) -> Failure | None:
        for load, delta in found.items():
            if isinstance(delta, str):
                return self.fail("ranks differ", f"{where}, {load}: {delta}")
            if not np.array_equal(delta, wanted):
                index = tuple(int(i) for i in np.argwhere(delta != wanted)[0])
                return self.fail(
                    "other delta",
                    f"{where}, {load}: {int((delta != wanted).sum())} of {wanted.size} elements; at {index} "
                    f"{delta[index]:g}, the whole adapter adds {wanted[index]:g}",
                )
        return None

    def control(self, bench: Bench) -> Control:
        """A scale four times too small."""
        ranks = rank_bench(bench)

        def weaker(call: Call) -> Call:
            def wrong(*arguments: object) -> object:
                y = call(*arguments)
                assert isinstance(y, torch.Tensor)
                ranks.synchronize()
                return y * 0.25

            return wrong

        return self.judged(ranks.spoiled(weaker), control_case(ranks, "sgmv", MODULE_CASE))


MODULE_CASE: Mapping[str, Choice] = {
    "dims.tokens": 1,
    "dims.k": 8,
    "dims.n": 8,
    "data": "digits",
    "structure.adapters": "one",
    "structure.ranks": "uneven",
    "structure.layer": "row",
    "structure.module": "k_proj",
}


def _deltas(
    bench: RankBench, folder: Path, module: str, adapter: Adapter, x: Floats, dtype: str
) -> dict[str, Floats | str]:
    """The module's whole delta after each way of loading, put together from all ranks; a text where copies differ."""
    cut = cut_module(
        bench.backend,
        bench.device,
        folder,
        module,
        dtype=format_of(dtype).torch,
        rank=bench.rank,
        world_size=bench.world_size,
        rank_rows=2 * adapter.rank,
    )
    store = bench.backend.allocate_adapters(
        {cut.site: cut.weight}, rank_rows=2 * adapter.rank, slots=SLOTS, device=bench.device
    )
    packed = cut.packed if cut.packed is not None else _nothing(format_of(dtype).torch)
    first, second = (
        SlotRange(slot=s, first_rank_row=i * adapter.rank, rank_rows=adapter.rank)
        for i, s in enumerate((FIRST, SECOND))
    )
    found: dict[str, Floats | str] = {}
    store.write(first, packed).synchronize()
    found[LOADS[0]] = _whole(bench, cut, store, FIRST, x, dtype, module)
    store.write(second, packed).synchronize()
    found[LOADS[1]] = _whole(bench, cut, store, SECOND, x, dtype, module)
    store.clear(FIRST)
    store.write(first, packed).synchronize()
    found[LOADS[2]] = _whole(bench, cut, store, FIRST, x, dtype, module)
    return found


def _nothing(dtype: torch.dtype) -> PackedAdapter:
    return PackedAdapter(buffer=torch.zeros(0, dtype=dtype), entries=(), max_rank=0)


def _whole(
    bench: RankBench, cut: ModuleCut, store: AdapterStore, slot: int, x: Floats, dtype: str, module: str
) -> Floats | str:
    """One call on this rank's columns of x, and every rank's rows of the result in their place."""
    y = _call(bench, cut, store, slot, x, dtype, module)
    rows = [row for begin, end in cut.rows for row in range(begin, end)]
    own = y[:, cut.begin : cut.begin + len(rows)]
    whole = np.full((len(x), FEATURES[module][0]), np.nan)
    for rank, part in enumerate(bench.control.gather("delta", (rows, own))):
        assert isinstance(part, tuple)
        where, values = part
        known = whole[:, where]
        if not np.array_equal(known[~np.isnan(known)], values[~np.isnan(known)]):
            return f"rank {rank} has other values for rows that another rank holds too"
        whole[:, where] = values
    return whole


def _call(
    bench: RankBench, cut: ModuleCut, store: AdapterStore, slot: int, x: Floats, dtype: str, module: str
) -> Floats:
    """``[tokens, n of the site]``: the station on a weight of zeros."""
    own = np.zeros((len(x), cut.width))
    columns = np.concatenate([x[:, begin:end] for begin, end in cut.columns] or [own[:, :0]], axis=1)
    own[:, : columns.shape[1]] = columns
    rows = np.arange(len(x), dtype=np.int32)
    triples = AdapterRows.build(rows, np.full(len(x), slot, dtype=np.int32), np.ones(len(x), dtype=np.float32))
    inputs = row_step(Source(0), len(x), adapters=triples)
    spec = cut.weight.spec
    row_parallel = module in ROW_PARALLEL
    prepared = Prepared(
        arguments={},
        collect=lambda result, tensors: {},
        static={
            "dtype": dtype,
            "k": spec.k,
            "hidden": spec.n,
            "slices": tuple(part.n for part in spec.slices),
            "bias": False,
            "world_size": bench.world_size,
            "quantised": False,
            "group_size": 0,
            "largest_rank": store.rank_rows // 2,
        },
        ranges={"tokens": (len(x), len(x))},
        token_class=inputs.token_class,
        adapters=True,
    )
    station = "row_parallel_linear" if row_parallel else "column_linear"
    call = bench.resolve(station, prepared).call
    arguments = {
        "x": bench.upload(Operand.rounded(own, dtype).torch()),
        "weight": cut.weight,
        "step": bench.begin_step(inputs, DeviceState(adapters=store)),
        "comm": bench.comm,
        "reduce": True,
        "row_set": "tokens",
    }
    order = ("x", "weight", "step", "comm", "reduce") if row_parallel else ("x", "weight", "step", "row_set")
    y = call_by_name(call, order, arguments)
    assert isinstance(y, torch.Tensor)
    bench.synchronize()
    return from_torch(y).astype(np.float64)


TP_CHECKS: Mapping[str, Check] = MappingProxyType({check.name: check for check in (TpDeltaEqual(),)})
