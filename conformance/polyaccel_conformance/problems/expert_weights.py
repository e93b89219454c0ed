"""Weights and adapters of experts: host values, and how they get into a backend's storage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from polyaccel.backend import (
    AdapterStore,
    PackedAdapter,
    PackedEntry,
    Quantisation,
    Slice,
    SlotRange,
    Weight,
    WeightSpec,
)
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.formats import FORMATS
from polyaccel_conformance.operand import Operand
from polyaccel_conformance.oracle.moe import Projection

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Codes:
    """The canonical quantised form: ``codes: [experts, n, k]``, ``zeros, scales: [experts, n, groups]``."""

    codes: Ints
    zeros: Ints
    scales: Floats
    quantisation: Quantisation

    def dequantised(self, dtype: str) -> Floats:
        """``(q - z) * s``, float32 product, one rounding to the weight's dtype."""
        group = np.arange(self.codes.shape[2]) // self.quantisation.group_size
        product = (self.codes - self.zeros[..., group]) * self.scales[..., group]
        return FORMATS[dtype].round(FORMATS["float32"].round(product))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertWeight:
    """``matrix: [experts, n, k]`` as dequantised; ``codes`` where it is quantised; ``bias: [experts, n]`` or None."""

    site: str
    matrix: Operand
    bias: Operand | None
    slices: tuple[int, ...]
    codes: Codes | None
    rank_rows: int

    @property
    def spec(self) -> WeightSpec:
        experts, _, k = self.matrix.shape
        return WeightSpec(
            site=self.site,
            slices=tuple(Slice(name=f"s{i}", n=n) for i, n in enumerate(self.slices)),
            k=k,
            dtype=FORMATS[self.matrix.dtype].torch,
            bias=self.bias is not None,
            quantisation=None if self.codes is None else self.codes.quantisation,
            rank_rows=self.rank_rows,
            experts=experts,
        )

    def projection(self) -> Projection:
        return Projection(
            matrix=self.matrix.values.astype(np.float64),
            bias=None if self.bias is None else self.bias.values.astype(np.float64),
            slices=self.slices,
        )

    def place(self, bench: Bench) -> Weight:
        """Allocated, written expert by expert in falling order, and sealed."""
        spec = self.spec
        weight = bench.backend.allocate_weight(spec, bench.device)
        matrix = self.matrix.torch()
        bias = None if self.bias is None else self.bias.torch()
        for expert in reversed(range(matrix.shape[0])):
            for i, (begin, n) in enumerate(zip(spec.starts, self.slices, strict=False)):
                rows = slice(begin, begin + n)
                if self.codes is None:
                    weight.write(i, matrix[expert, rows], expert=expert)
                else:
                    self._write_codes(weight, self.codes, i, expert, rows)
                if bias is not None:
                    weight.write_bias(i, bias[expert, rows], expert=expert)
        weight.seal()
        return weight

    def digests(self) -> dict[str, str]:
        parts = {self.site: self.matrix, f"{self.site}.bias": self.bias}
        return {name: operand.digest() for name, operand in parts.items() if operand is not None}

    @staticmethod
    def _write_codes(weight: Weight, codes: Codes, index: int, expert: int, rows: slice) -> None:
        weight.write_quantised(
            index,
            torch.from_numpy(codes.codes[expert, rows].astype(np.uint8)),
            torch.from_numpy(codes.zeros[expert, rows].astype(np.uint8)),
            torch.from_numpy(codes.scales[expert, rows]).to(codes.quantisation.scale_dtype),
            expert=expert,
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertModule:
    """What an adapter does to one slice, of one expert where there are any: ``a: [rank, k]``, ``b: [n, rank]``."""

    site: str
    slice: int
    expert: int | None
    a: Floats
    b: Floats


def pack(modules: Sequence[ExpertModule], dtype: str) -> PackedAdapter:
    """The packed form that a store takes, matrices in the order of ``modules``."""
    entries, parts, offset = [], [np.zeros(0)], 0
    for module in modules:
        rank = module.a.shape[0]
        entries.append(
            PackedEntry(
                site=module.site,
                slice=module.slice,
                expert=module.expert,
                kind="linear",
                rank=rank,
                a_offset=offset,
                a_shape=(rank, module.a.shape[1]),
                b_offset=offset + module.a.size,
                b_shape=(module.b.shape[0], rank),
            )
        )
        parts += [module.a.reshape(-1), module.b.reshape(-1)]
        offset += module.a.size + module.b.size
    buffer = Operand.rounded(np.concatenate(parts), dtype).torch()
    return PackedAdapter(buffer=buffer, entries=tuple(entries), max_rank=max((e.rank for e in entries), default=0))


def place_adapters(
    bench: Bench,
    weights: Mapping[str, Weight],
    adapters: Mapping[int, Sequence[ExpertModule]],
    dtype: str,
    *,
    slots: int,
    rank_rows: int,
) -> AdapterStore:
    """A store with an adapter in each named slot, rank rows handed out without gaps in falling order of slot."""
    store = bench.backend.allocate_adapters(weights, rank_rows=rank_rows, slots=slots, device=bench.device)
    first = 0
    for slot in sorted(adapters, reverse=True):
        packed = pack(adapters[slot], dtype)
        store.write(SlotRange(slot=slot, first_rank_row=first, rank_rows=packed.max_rank), packed).synchronize()
        first += packed.max_rank
    return store
