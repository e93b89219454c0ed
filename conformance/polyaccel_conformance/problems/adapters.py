"""Adapters of a problem: host matrices, the slots that they lie in, and how they get into a backend's store."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Self

import numpy as np

from polyaccel.backend import AdapterStore, PackedAdapter, PackedEntry, SlotRange, Weight
from polyaccel_conformance.bench import SITE, Bench
from polyaccel_conformance.formats import to_torch
from polyaccel_conformance.operand import Operand
from polyaccel_conformance.oracle.lora import Adapter, Module
from polyaccel_conformance.problems.contraction import integer_columns, random_columns
from polyaccel_conformance.problems.placed import PlacedProblem
from polyaccel_conformance.problems.weights import HostWeight
from polyaccel_conformance.words import Floats, Source

RANKS = ("pair", "mixed", "per_slice", "equal", "consecutive")
"""Ranks of the adapters of a case, see :func:`module_ranks`."""

HISTORIES = ("fresh", "reloaded", "dirty")
"""What slots held before: nothing; an adapter of larger rank each; NaN in every rank row of the store."""

MOST_RANK = 512

CONSECUTIVE = 8

GAP = 3
"""Elements of nobody behind each matrix of a packed adapter."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HostModule:
    """One adapter's matrices on one slice: ``a: [rank, k]``, ``b: [n, rank]`` (of an embedding ``a: [rank, n]`` and
    ``b: [k, rank]``), the scale folded into b."""

    a: Operand
    b: Operand

    @property
    def rank(self) -> int:
        return self.a.shape[0]


HostAdapter = tuple[HostModule | None, ...]
"""By slice; None where the adapter does not touch it."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HostAdapters:
    """The content of a store at one site, and how it came to be.

    Attributes:
        slots: of the store; ``rank_rows``: of the store.
        adapters: by slot, of the slots that hold one.
        discarded: by slot, adapters that are written and cleared again.
        ranges: rank rows of either.
        before: by slot, adapters that are written first, into the same ranges.
        dirty: every rank row of the store held NaN before.
        lookup: of an embedding.
    """

    slots: int
    rank_rows: int
    adapters: Mapping[int, HostAdapter]
    ranges: Mapping[int, SlotRange]
    discarded: Mapping[int, HostAdapter] = field(default_factory=lambda: MappingProxyType({}))
    before: Mapping[int, HostAdapter] = field(default_factory=lambda: MappingProxyType({}))
    dirty: bool = False
    lookup: bool = False
    _packs: dict[tuple[str, int], PackedAdapter] = field(default_factory=dict, init=False, repr=False)

    @property
    def largest_rank(self) -> int:
        """Of all filled slots."""
        return max((m.rank for adapter in self.adapters.values() for m in adapter if m is not None), default=0)

    def oracle(self) -> dict[int, Adapter]:
        """The modules as the oracle takes them."""
        return {slot: tuple(_module(m) for m in adapter) for slot, adapter in self.adapters.items()}

    def place(self, bench: Bench, weight: Weight, site: str = SITE) -> AdapterStore:
        """A store for the weight's site, filled as described; the device has finished."""
        store = bench.backend.allocate_adapters(
            {site: weight}, rank_rows=self.rank_rows, slots=self.slots, device=bench.device
        )
        if self.dirty and self.rank_rows:
            everything = SlotRange(slot=0, first_rank_row=0, rank_rows=self.rank_rows)
            store.write(everything, pack(site, _spoiled(weight, self.rank_rows, self.lookup), lookup=self.lookup))
            store.clear(0)
        for slot, where in self.ranges.items():
            if slot in self.before:
                store.write(where, self._packed(site, self.before[slot]))
            store.write(where, self._packed(site, self.adapters.get(slot) or self.discarded[slot]))
        for slot in self.discarded:
            store.clear(slot)
        bench.synchronize()
        return store

    def digests(self) -> dict[str, str]:
        """Of every matrix that is written."""
        known: dict[int, str] = {}

        def digest(operand: Operand) -> str:
            # What is cleared again is an adapter that another slot keeps.
            found = known.get(id(operand))
            if found is None:
                found = known[id(operand)] = operand.digest()
            return found

        return {
            f"{when}{slot}.{i}.{name}": digest(operand)
            for when, held in (("slot", self.adapters), ("cleared", self.discarded), ("before", self.before))
            for slot, adapter in held.items()
            for i, module in enumerate(adapter)
            if module is not None
            for name, operand in (("a", module.a), ("b", module.b))
        }

    def _packed(self, site: str, adapter: HostAdapter) -> PackedAdapter:
        """Packed once, for the calls of a case place the same adapters; the buffer is a new one each time."""
        found = self._packs.get((site, id(adapter)))
        if found is None:
            found = self._packs[site, id(adapter)] = pack(site, adapter, lookup=self.lookup)
        return PackedAdapter(buffer=found.buffer.clone(), entries=found.entries, max_rank=found.max_rank)

    def scaled(self, shift: int, starts: Sequence[int]) -> HostAdapters:
        """B times ``2^shift``, the odd outputs of the site negative; ``starts``: first output of each slice."""

        def change(index: int, module: HostModule) -> HostModule:
            outputs = np.arange(module.b.shape[0])[:, None] + starts[index]
            b = np.ldexp(module.b.values.astype(np.float64), shift) * (1.0 - 2.0 * (outputs % 2))
            return HostModule(a=module.a, b=Operand.rounded(b, module.b.dtype))

        return self._mapped(change)

    # -- one rank's part ---------------------------------------------------------------------------------------------

    def output_rows(self, cuts: Sequence[tuple[int, int]]) -> HostAdapters:
        """For rows ``begin:end`` of each slice (column parallel): A whole, B cut by output."""

        def cut(index: int, module: HostModule) -> HostModule:
            begin, end = cuts[index]
            return HostModule(a=module.a, b=Operand(module.b.values[begin:end], module.b.dtype))

        return self._mapped(cut)

    def input_columns(self, begin: int, end: int) -> HostAdapters:
        """For input columns ``begin:end`` (row parallel): A cut by input, B whole."""

        def cut(index: int, module: HostModule) -> HostModule:
            return HostModule(a=Operand(module.a.values[:, begin:end], module.a.dtype), b=module.b)

        return self._mapped(cut)

    def _mapped(self, cut: Callable[[int, HostModule], HostModule]) -> HostAdapters:
        def apply(adapters: Mapping[int, HostAdapter]) -> dict[int, HostAdapter]:
            return {
                slot: tuple(None if m is None else cut(i, m) for i, m in enumerate(adapter))
                for slot, adapter in adapters.items()
            }

        return replace(self, adapters=apply(self.adapters), discarded=apply(self.discarded), before=apply(self.before))


class AdaptedProblem(PlacedProblem[tuple[Weight, AdapterStore]]):
    """A problem whose calls read a weight with its adapters, and nothing else that is kept from step to step."""

    weight: HostWeight
    adapters: HostAdapters

    def place(self, bench: Bench) -> tuple[Weight, AdapterStore]:
        weight = self.weight.place(bench, rank_rows=self.adapters.rank_rows)
        return weight, self.adapters.place(bench, weight)

    def beside(self) -> Self:
        other = super().beside()
        # It may have other rows.
        vars(other).pop("inputs", None)
        return other


def module_ranks(pattern: str, rank: int, slices: int) -> tuple[tuple[int, ...], ...]:
    """Ranks by adapter and slice; 0 where an adapter does not touch a slice.

    ``pair``: two adapters of one rank. ``equal``: three. ``mixed``: four, smaller and larger too. ``per_slice``: three
    whose slices differ, some untouched. ``consecutive``: :data:`CONSECUTIVE` of them, of ranks ``rank``, ``rank + 1``
    and so on.
    """
    if pattern in ("pair", "equal"):
        return ((rank,) * slices,) * (2 if pattern == "pair" else 3)
    if pattern == "mixed":
        four = (rank, 1, min(2 * rank, MOST_RANK), max(rank // 3, 1))
        return tuple((each,) * slices for each in four)
    if pattern == "per_slice":
        choice = (rank, 0, rank // 2 + 1)
        return tuple(tuple(choice[(adapter + i) % 3] for i in range(slices)) for adapter in range(3))
    return tuple((min(rank + i, MOST_RANK),) * slices for i in range(CONSECUTIVE))


def arrange(
    source: Source,
    adapters: Sequence[HostAdapter],
    *,
    before: Sequence[HostAdapter] = (),
    dirty: bool = False,
    lookup: bool = False,
) -> HostAdapters:
    """Adapters in slots and rank rows. Slots are in random order, the last one is used and two are empty, of which one
    held the first adapter; ranges are in random order, some longer than the rank, with rank rows of nobody between.

    ``before``: what each adapter's slot held first.
    """
    count = len(adapters)
    slots = count + 2
    used = [*source.permutation("slots", slots - 1)[: max(count - 1, 0)].tolist(), *([slots - 1] if count else [])]
    empty = min(set(range(slots)) - set(used))
    spare = source.integers("spare rank rows", (count,), 0, 3).tolist()
    ranges: dict[int, SlotRange] = {}
    first = 2
    for i in source.permutation("ranges", count).tolist():
        rows = max(_rank(adapters[i]), _rank(before[i]) if before else 0, 1) + spare[i]
        ranges[used[i]] = SlotRange(slot=used[i], first_rank_row=first, rank_rows=rows)
        first += rows + spare[i] % 2
    discarded: dict[int, HostAdapter] = {}
    if count:
        rows = max(_rank(adapters[0]), 1)
        discarded[empty] = adapters[0]
        ranges[empty] = SlotRange(slot=empty, first_rank_row=first, rank_rows=rows)
        first += rows
    return HostAdapters(
        slots=slots,
        rank_rows=first + 1,
        adapters=dict(zip(used, adapters, strict=True)),
        discarded=discarded,
        ranges=ranges,
        before=dict(zip(used, before, strict=True)) if before else {},
        dirty=dirty,
        lookup=lookup,
    )


def _rank(adapter: HostAdapter) -> int:
    return max((m.rank for m in adapter if m is not None), default=0)


def pack(site: str, adapter: HostAdapter, *, lookup: bool = False) -> PackedAdapter:
    """In one buffer, with elements of nobody (NaN) between the matrices, B before A."""
    entries: list[PackedEntry] = []
    parts: list[Floats] = []
    dtype = next((m.a.dtype for m in adapter if m is not None), "float32")
    gap = np.full(GAP, np.nan)
    end = 0
    for i, module in enumerate(adapter):
        if module is None:
            continue
        b, a = module.b.values.astype(np.float64, copy=False), module.a.values.astype(np.float64, copy=False)
        parts += [b.reshape(-1), gap, a.reshape(-1), gap]
        entries.append(
            PackedEntry(
                site=site,
                slice=i,
                expert=None,
                kind="embedding" if lookup else "linear",
                rank=module.rank,
                a_offset=end + b.size + GAP,
                a_shape=(a.shape[0], a.shape[1]),
                b_offset=end,
                b_shape=(b.shape[0], b.shape[1]),
            )
        )
        end += b.size + a.size + 2 * GAP
    buffer = to_torch(np.concatenate(parts) if parts else np.zeros(0), dtype)
    return PackedAdapter(buffer=buffer, entries=tuple(entries), max_rank=max((e.rank for e in entries), default=0))


def draw_adapters(
    source: Source,
    dtype: str,
    data: str,
    ranks: Sequence[Sequence[int]],
    slices: Sequence[int],
    k: int,
    *,
    name: str = "adapter",
    lookup: bool = False,
    most: int | None = None,
) -> list[HostAdapter]:
    """Adapters with matrices of the case's kind of data, ``ranks`` by adapter and slice.

    ``integers``: two columns of A count for each rank row and two rank rows for each output, so that h stays below
    256 for x up to 64 (128): every permitted format holds it. The integers of B are different for each adapter.
    ``cancelling``: dense rows whose halves nearly cancel, A over k and B over the rank. ``small``: as integers, for x
    up to 2, with deltas of a few units. ``most``: of the integers of ``cancelling``, which bounds the deltas.
    """
    return [
        tuple(
            _draw_module(source, dtype, data, rank, n, k, f"{name} {index}.{i}", index, lookup, most) if rank else None
            for i, (rank, n) in enumerate(zip(own, slices, strict=True))
        )
        for index, own in enumerate(ranks)
    ]


def _draw_module(
    source: Source,
    dtype: str,
    data: str,
    rank: int,
    n: int,
    k: int,
    name: str,
    index: int,
    lookup: bool,
    most: int | None,
) -> HostModule:
    columns, outputs = (n, k) if lookup else (k, n)
    a_name, b_name = f"{name} a", f"{name} b"
    if data in ("integers", "small"):
        a = _lookup_integers(source, rank, n, a_name) if lookup else sparse(source, rank, columns, (1, 1), a_name)
        codes = (2 * index + 1, 2 * index + 2) if data == "integers" else (1 + index % 2, 2)
        b = sparse(source, outputs, rank, codes, b_name)
    elif data == "cancelling":
        a = (
            _lookup_integers(source, rank, n, a_name)
            if lookup
            else integer_columns(source, dtype, data, rank, k, a_name, most=most)
        )
        half = rank // 2
        a[half : 2 * half] = a[:half]
        b = integer_columns(source, dtype, data, outputs, rank, b_name, most=most)
        if half:
            b[np.arange(outputs), half + source.integers(f"{b_name} extra", (outputs,), 0, half - 1)] += 1
    else:
        kind = data if data in ("positive", "wide", "ramp", "overflow") else "normal"
        # Deltas of the size of y, whatever the widths.
        a = np.ldexp(random_columns(source, kind, rank, columns, a_name), 0 if lookup else -_half_bits(columns))
        b = random_columns(source, "normal" if kind == "ramp" else kind, outputs, rank, b_name)
        b = np.ldexp(b, -_half_bits(rank))
    return HostModule(a=Operand.rounded(a, dtype), b=Operand.rounded(b, dtype))


def _half_bits(n: int) -> int:
    """Log2 of the square root of n."""
    return (max(n, 1).bit_length() - 1) // 2


def sparse(source: Source, rows: int, columns: int, codes: tuple[int, int], name: str) -> Floats:
    """Two entries of random sign a row, in random columns; the first of row i counts columns from the end, so that
    each is used, the last one always."""
    matrix = np.zeros((rows, columns))
    if not columns:
        return matrix
    signs = 1 - 2 * source.integers(f"{name} sign", (2, rows), 0, 1)
    each = np.arange(rows)
    matrix[each, columns - 1 - each % columns] = codes[0] * signs[0]
    matrix[each, source.integers(f"{name} column", (rows,), 0, columns - 1)] += codes[1] * signs[1]
    return matrix


def _lookup_integers(source: Source, rank: int, n: int, name: str) -> Floats:
    return source.integers(name, (rank, n), -64, 64).astype(np.float64)


def _module(module: HostModule | None) -> Module | None:
    if module is None:
        return None
    return Module(a=module.a.values.astype(np.float64), b=module.b.values.astype(np.float64))


def _spoiled(weight: Weight, rank: int, lookup: bool) -> HostAdapter:
    spec = weight.spec
    dtype = str(spec.dtype).removeprefix("torch.")

    def nan(*shape: int) -> Operand:
        return Operand(np.full(shape, np.nan), dtype)

    if lookup:
        return (HostModule(a=nan(rank, spec.n), b=nan(spec.k, rank)),)
    return tuple(HostModule(a=nan(rank, spec.k), b=nan(part.n, rank)) for part in spec.slices)
