"""What one rank holds of a weight and of the adapters on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from polyaccel.backend import AdapterStore, PackedAdapter, PackedEntry, Slice, SlotRange, Weight, WeightSpec
from polyaccel_conformance.bench import SITE, Bench
from polyaccel_conformance.formats import FORMATS
from polyaccel_conformance.harness.layouts import place as placed
from polyaccel_conformance.operand import Operand
from polyaccel_conformance.oracle.lora import Adapter, Module

Floats = npt.NDArray[np.float64]
Range = tuple[int, int]

SLOTS = 4
FILLED = (1, 3)
EMPTY = 2
RANKS: Mapping[str, tuple[int, ...]] = {"one": (1, 1), "mixed": (3, 8), "wide": (16, 5), "uneven": (7, 33)}
"""True ranks of the adapters in the filled slots."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """A rank's part: ``rows`` of each slice (of the slice's own), ``columns``, and whether it holds the bias."""

    rows: tuple[Range, ...]
    columns: Range
    bias: bool


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WholeWeight:
    """A float weight before any cut: ``matrix: [n, k]`` of all slices, ``bias: [n]`` or None.

    ``lookup``: an embedding table, whose rows are a vocabulary.
    """

    matrix: Operand
    bias: Operand | None
    slices: tuple[int, ...]
    lookup: bool = False

    def spec(self, share: Share, rank_rows: int) -> WeightSpec:
        return WeightSpec(
            site=SITE,
            slices=tuple(Slice(name=f"s{i}", n=end - begin) for i, (begin, end) in enumerate(share.rows)),
            k=share.columns[1] - share.columns[0],
            dtype=FORMATS[self.matrix.dtype].torch,
            bias=share.bias,
            rank_rows=rank_rows,
            lookup=self.lookup,
        )

    def rows_of(self, share: Share) -> npt.NDArray[np.int64]:
        """Rows of the whole matrix, in the order of the share's weight."""
        starts = np.cumsum([0, *self.slices])
        return np.concatenate([np.arange(s + b, s + e) for s, (b, e) in zip(starts, share.rows, strict=False)])

    def matrix_of(self, share: Share) -> Floats:
        """``[rows, columns]`` of the share."""
        values = self.matrix.values[self.rows_of(share), share.columns[0] : share.columns[1]]
        return values.astype(np.float64)

    def bias_of(self, share: Share) -> Floats | None:
        if not share.bias or self.bias is None:
            return None
        return self.bias.values[self.rows_of(share)].astype(np.float64)

    def place(self, bench: Bench, share: Share, rank_rows: int = 0, layouts: Mapping[str, str] | None = None) -> Weight:
        """The share's weight: allocated, written slice by slice and sealed. ``layouts`` of what is written from, by
        ``weight`` and ``bias``."""
        spec = self.spec(share, rank_rows)
        weight = bench.backend.allocate_weight(spec, bench.device)
        matrix, bias = self.matrix_of(share), self.bias_of(share)
        dtype, layouts = self.matrix.dtype, layouts or {}
        for i, (begin, part) in enumerate(zip(spec.starts, spec.slices, strict=False)):
            if part.n and spec.k:
                rows = matrix[begin : begin + part.n]
                weight.write(i, laid_out(Operand(rows, dtype), layouts.get("weight", "contiguous")))
            if part.n and bias is not None:
                values = Operand(bias[begin : begin + part.n], dtype)
                weight.write_bias(i, laid_out(values, layouts.get("bias", "contiguous")))
        weight.seal()
        return weight


def laid_out(operand: Operand, layout: str) -> torch.Tensor:
    """A host tensor with the operand's values in a layout."""
    values = operand.torch()
    where = placed(values.shape, layout, 0)
    room = torch.zeros(where.span, dtype=values.dtype)
    view = room.as_strided(values.shape, where.strides, where.offset)
    view.copy_(values)
    return view


def cut_adapter(adapter: Adapter, share: Share, *, lookup: bool = False) -> Adapter:
    """What a rank holds of an adapter: A by its columns, B by its rows. A table's rows are columns of A."""
    begin, end = share.rows[0] if lookup else share.columns
    found: list[Module | None] = []
    for module, rows in zip(adapter, share.rows, strict=True):
        if module is None:
            found.append(None)
            continue
        b = module.b if lookup else module.b[rows[0] : rows[1]]
        held = end > begin and len(b) > 0
        found.append(Module(a=module.a[:, begin:end], b=b) if held else None)
    return tuple(found)


def largest_rank(adapters: Mapping[int, Adapter]) -> int:
    """Of all modules; what a plan is extended to."""
    return max((m.rank for adapter in adapters.values() for m in adapter if m is not None), default=0)


def place_adapters(
    bench: Bench, weight: Weight, adapters: Mapping[int, Adapter], dtype: str, ranks: Sequence[int], rank_rows: int
) -> AdapterStore:
    """A store with the rank's part of an adapter in each named slot; rank rows are the same on every rank, also where
    one holds nothing of a module."""
    store = bench.backend.allocate_adapters({SITE: weight}, rank_rows=rank_rows, slots=SLOTS, device=bench.device)
    first = 0
    for (slot, adapter), rank in zip(adapters.items(), ranks, strict=True):
        packed = _pack(adapter, dtype, lookup=weight.spec.lookup)
        store.write(SlotRange(slot=slot, first_rank_row=first, rank_rows=rank), packed).synchronize()
        first += rank
    return store


def _pack(adapter: Adapter, dtype: str, *, lookup: bool) -> PackedAdapter:
    entries: list[PackedEntry] = []
    parts, offset = [np.zeros(0)], 0
    for index, module in enumerate(adapter):
        if module is None:
            continue
        entries.append(
            PackedEntry(
                site=SITE,
                slice=index,
                expert=None,
                kind="embedding" if lookup else "linear",
                rank=module.rank,
                a_offset=offset,
                a_shape=(module.rank, module.a.shape[1]),
                b_offset=offset + module.a.size,
                b_shape=(module.b.shape[0], module.rank),
            )
        )
        parts += [module.a.reshape(-1), module.b.reshape(-1)]
        offset += module.a.size + module.b.size
    buffer = Operand(np.concatenate(parts), dtype).torch()
    return PackedAdapter(buffer=buffer, entries=tuple(entries), max_rank=max((e.rank for e in entries), default=0))
