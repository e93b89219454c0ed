"""``storage.adapters``: what a slot holds is what was written to it last, and nothing else."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from polyaccel.backend import (
    AdapterRows,
    AdapterStore,
    DeviceState,
    PackedAdapter,
    Slice,
    SlotRange,
    Weight,
    WeightSpec,
)
from polyaccel.backend.support import Static
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Case, Choice
from polyaccel_conformance.device_check import DeviceCheck, DeviceProblem, Facts
from polyaccel_conformance.formats import FORMATS, from_torch, to_torch
from polyaccel_conformance.problem import Prepared, Problem
from polyaccel_conformance.problems.expert_weights import ExpertModule, pack
from polyaccel_conformance.problems.steps import row_step

SLOTS = 3
USED, OTHER = 1, 2
Key = tuple[str, int, int | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Held:
    """An adapter as the case defines it, and where it is to lie."""

    modules: Mapping[Key, ExpertModule]
    where: SlotRange

    def packed(self, dtype: str) -> PackedAdapter:
        return pack(list(self.modules.values()), dtype)


class AdapterProblem(DeviceProblem):
    """Write, replace by a smaller adapter, refuse, clear; a neighbouring slot stays as it is."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        n, k, experts = case.dim("n"), case.dim("k"), case.dim("experts")
        dtype = FORMATS[case.dtype].torch
        rank, smaller = case.dim("rank"), case.dim("second_rank")
        self.rank_rows = rank + 4
        slices = tuple(Slice(name=f"s{i}", n=n + i) for i in range(case.dim("slices")))
        self.specs = {
            "first": WeightSpec(
                site="first",
                slices=slices,
                k=k,
                dtype=dtype,
                rank_rows=self.rank_rows,
                experts=experts or None,
            ),
            "second": WeightSpec(
                site="second", slices=(Slice(name="s0", n=n),), k=k + 1, dtype=dtype, rank_rows=self.rank_rows
            ),
            "without": WeightSpec(site="without", slices=(Slice(name="s0", n=n),), k=k, dtype=dtype),
        }
        last = self.rank_rows - 3
        same = bool(case.structure["same_range"])
        # Up to the row where the neighbour begins.
        first_row = 0 if same else last - smaller
        self.large = self._adapter("large", rank, SlotRange(slot=USED, first_rank_row=0, rank_rows=rank), 1)
        self.small = self._adapter(
            "small", smaller, SlotRange(slot=USED, first_rank_row=first_row, rank_rows=rank if same else smaller), 2
        )
        self.other = self._adapter("other", 3, SlotRange(slot=OTHER, first_rank_row=last, rank_rows=3), 1)

    def drive(self, bench: Bench, facts: Facts) -> None:
        weights = {site: bench.backend.allocate_weight(spec, bench.device) for site, spec in self.specs.items()}
        for weight in weights.values():
            self._zero(weight)
        store = bench.backend.allocate_adapters(weights, rank_rows=self.rank_rows, slots=SLOTS, device=bench.device)
        facts.check("empty: no ranges", list(store.ranges()) == [None] * SLOTS, str(list(store.ranges())))
        self._compare(bench, facts, "empty", store, weights, {})
        self._put(bench, store, self.other)
        self._put(bench, store, self.large)
        self._compare(bench, facts, "written", store, weights, {USED: self.large, OTHER: self.other})
        if not self.sabotaged:
            self._put(bench, store, self.small)
        self._compare(bench, facts, "replaced", store, weights, {USED: self.small, OTHER: self.other})
        where, broken, named = self._broken()
        facts.refused("a wrong entry or range", lambda: store.write(where, broken), named)
        self._compare(bench, facts, "refused", store, weights, {OTHER: self.other})
        self._put(bench, store, self.small)
        self._put(bench, store, self.other)
        self._compare(bench, facts, "both written", store, weights, {USED: self.small, OTHER: self.other})
        for slot in (-1, SLOTS):
            facts.refused(f"no slot {slot}", lambda slot=slot: store.clear(slot), str(slot))  # type: ignore[misc]
        store.clear(USED)
        store.clear(USED)
        self._compare(bench, facts, "cleared", store, weights, {OTHER: self.other})
        facts.check("nbytes: some", store.nbytes > 0, f"{store.nbytes} bytes")

    def _put(self, bench: Bench, store: AdapterStore, adapter: _Held) -> None:
        packed = adapter.packed(self.case.dtype)
        store.write(adapter.where, packed).synchronize()
        # The contract: the buffer may be reused once the event has completed.
        packed.buffer.fill_(float("nan"))

    def _zero(self, weight: Weight) -> None:
        spec = weight.spec
        for index, part in enumerate(spec.slices):
            for expert in (None,) if spec.experts is None else range(spec.experts):
                weight.write(index, torch.zeros((part.n, spec.k), dtype=spec.dtype), expert=expert)
        weight.seal()

    def _broken(self) -> tuple[SlotRange, PackedAdapter, str]:
        """An adapter that must be refused for its last entry or its range, and what the error must name."""
        wrong, where = str(self.case.structure["wrong"]), self.small.where
        good = self.small.packed(self.case.dtype)
        rows = where.rank_rows
        begins = {"negative": -1, "beyond": self.rank_rows - rows + 1, "overlap": self.rank_rows - 2 - rows}
        if wrong in begins:
            return replace(where, first_rank_row=begins[wrong]), good, f"slot {where.slot}"
        last = good.entries[-1]
        (rank, k), n, spec = last.a_shape, last.b_shape[0], self.specs[last.site]
        entry = {
            "site": replace(last, site="nowhere"),
            "room": replace(last, site="without"),
            "slice": replace(last, slice=len(spec.slices)),
            "expert": replace(last, expert=spec.experts or 0),
            "rank": replace(last, rank=rows + 1, a_shape=(rows + 1, k), b_shape=(n, rows + 1)),
            "a": replace(last, a_shape=(rank, k - 1)),
            "b": replace(last, b_shape=(n - 1, rank)),
        }[wrong]
        return where, replace(good, entries=(*good.entries[:-1], entry)), entry.site

    # -- what must be there --------------------------------------------------------------------------------------------

    def _compare(
        self,
        bench: Bench,
        facts: Facts,
        when: str,
        store: AdapterStore,
        weights: Mapping[str, Weight],
        held: Mapping[int, _Held],
    ) -> None:
        bench.synchronize()
        ranges = [held[slot].where if slot in held else None for slot in range(SLOTS)]
        facts.check(f"{when}: ranges", list(store.ranges()) == ranges, f"{list(store.ranges())} instead of {ranges}")
        for slot in range(SLOTS):
            for key in self._keys():
                module = held[slot].modules.get(key) if slot in held else None
                self._compare_module(facts, f"{when}: slot {slot}, {key}", store, slot, key, module)
        for site, weight in weights.items():
            if weight.spec.experts is None and weight.spec.rank_rows:
                self._compare_product(bench, facts, f"{when}: {site} by sgmv", store, weight, held)

    def _compare_module(
        self,
        facts: Facts,
        name: str,
        store: AdapterStore,
        slot: int,
        key: Key,
        module: ExpertModule | None,
    ) -> None:
        site, index, expert = key
        rank = 0 if module is None else module.a.shape[0]
        found = store.true_rank(site, index, slot, expert)
        facts.check(f"{name}: true rank", found == rank, f"{found} instead of {rank}")
        matrices = store.read(site, index, slot, expert)
        if module is None or matrices is None:
            detail = "matrices where there are none" if module is None else "nothing"
            facts.check(f"{name}: matrices", module is None and matrices is None, detail)
            return
        facts.same(f"{name}: A", matrices.a, to_torch(module.a, self.case.dtype))
        facts.same(f"{name}: B", matrices.b, to_torch(module.b, self.case.dtype))

    def _compare_product(
        self, bench: Bench, facts: Facts, name: str, store: AdapterStore, weight: Weight, held: Mapping[int, _Held]
    ) -> None:
        """Rows that name the used slot, both, the other, and none; integers, so that any order gives the same."""
        spec = weight.spec
        rows, slots = np.array([0, 1, 1, 2], dtype=np.int32), np.array([USED, USED, OTHER, OTHER], dtype=np.int32)
        triples = AdapterRows.build(rows, slots, np.ones(4, dtype=np.float32))
        x = self.source.integers(f"x {spec.site}", (4, spec.k), -1, 1).astype(np.float64)
        wanted = np.zeros((4, spec.n))
        for row, slot in zip(rows.tolist(), slots.tolist(), strict=True):
            for index, (begin, end) in enumerate(itertools.pairwise(spec.starts)):
                module = held[slot].modules.get((spec.site, index, None)) if slot in held else None
                if module is not None:
                    wanted[row, begin:end] += x[row] @ module.a.T @ module.b.T
        static: dict[str, Static] = {
            "dtype": self.case.dtype,
            "k": spec.k,
            "slices": tuple(part.n for part in spec.slices),
            "bias": False,
            "world_size": 1,
            "quantised": False,
            "largest_rank": self.case.dim("rank"),
        }
        prepared = Prepared(
            arguments={}, collect=lambda result, _: {}, static=static, ranges={"tokens": (4, 4)}, adapters=True
        )
        step = bench.begin_step(row_step(self.source, 4, adapters=triples), DeviceState(adapters=store))
        y = bench.upload(torch.zeros((4, spec.n), dtype=spec.dtype))
        operand = bench.upload(to_torch(x, self.case.dtype))
        bench.resolve("sgmv", prepared).call(y, operand, weight, step, "tokens")
        bench.synchronize()
        got = from_torch(y)
        facts.check(name, np.array_equal(got, wanted), f"{got.tolist()} instead of {wanted.tolist()}")

    # -- content -------------------------------------------------------------------------------------------------------

    def _keys(self) -> list[Key]:
        found: list[Key] = []
        for site, spec in self.specs.items():
            if spec.rank_rows:
                experts: Sequence[int | None] = (None,) if spec.experts is None else range(spec.experts)
                found += [(site, index, expert) for index in range(len(spec.slices)) for expert in experts]
        return found

    def _adapter(self, name: str, rank: int, where: SlotRange, seed: int) -> _Held:
        """Small integers; ``small`` leaves out some modules that the large one has. The first module has full rank."""
        modules: dict[Key, ExpertModule] = {}
        for number, key in enumerate(self._keys()):
            if number and (number + seed) % 3 == 0 and self.case.structure["partial"]:
                continue
            site, index, expert = key
            spec = self.specs[site]
            own = rank if number == 0 else max(rank - (number + seed) % 2, 1)
            modules[key] = ExpertModule(
                site=site,
                slice=index,
                expert=expert,
                a=self._sparse(f"{name} a {key}", (own, spec.k)),
                b=self._sparse(f"{name} b {key}", (spec.slices[index].n, own)),
            )
        return _Held(modules=modules, where=where)

    def _sparse(self, name: str, shape: tuple[int, int]) -> np.ndarray:
        """One 1 or -1 in each row, so that every product is small."""
        values = np.zeros(shape)
        column = self.source.integers(f"{name} column", (shape[0],), 0, shape[1] - 1)
        values[np.arange(shape[0]), column] = 1 - 2 * self.source.integers(f"{name} sign", (shape[0],), 0, 1)
        return values


class AdapterStorage(DeviceCheck):
    """Adapters of every shape, one after the other in the same slot."""

    operator = "storage.adapters"
    levels = ("L3",)

    def axes(self) -> Mapping[str, Sequence[Choice]]:
        return {
            "dtype": ("float32", "bfloat16", "float16"),
            "dims.n": (8, 1, 3, 17),
            "dims.k": (8, 1, 16, 33),
            "dims.slices": (1, 2, 3),
            "dims.experts": (0, 1, 2),
            "dims.rank": (4, 1, 2, 8, 17, 33),
            "dims.second_rank": (2, 1, 3, 16),
            "structure.same_range": (True, False),
            "structure.partial": (True, False),
            "structure.wrong": ("site", "room", "slice", "expert", "rank", "a", "b", "negative", "beyond", "overlap"),
        }

    def ranges(self) -> Mapping[str, tuple[int, int]]:
        return {
            "dims.n": (1, 24),
            "dims.k": (1, 40),
            "dims.rank": (1, 64),
            "dims.second_rank": (1, 64),
            "dims.experts": (0, 3),
        }

    def mend(self, axes: dict[str, Choice]) -> dict[str, Choice] | None:
        """The second adapter is no larger than the first."""
        rank, second = axes["dims.rank"], axes["dims.second_rank"]
        assert isinstance(rank, int)
        assert isinstance(second, int)
        return axes | {"dims.rank": max(rank, second)}

    def problem(self, case: Case) -> Problem:
        return AdapterProblem(case)
