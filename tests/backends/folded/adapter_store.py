"""Adapters: A inside the weights' buffers, B beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from polyaccel.backend import (
    AdapterStore,
    Event,
    LoraMatrices,
    OperatorError,
    PackedAdapter,
    PackedEntry,
    SlotRange,
    Weight,
    WeightSpec,
)

from .device import FoldedDevice
from .weight import FoldedWeight, folded

Module = tuple[str, int, int | None]


class FoldedAdapterStore(AdapterStore):
    """Every slot owns the same rank rows at every site; writes wait in the queue, host tables change at once.

    ``b[site][slice]: [rank_rows, n]`` (with leading ``experts``; ``[rank_rows, k]`` for an embedding), zero at first.
    ``spans: [slots, 2]`` int32 on the device: first rank row and count of each slot, count 0 where empty.
    """

    def __init__(self, weights: Mapping[str, Weight], *, rank_rows: int, slots: int, device: FoldedDevice) -> None:
        self.rank_rows, self.slots = rank_rows, slots
        self._device = device
        self.torch_device = device.torch_device
        self._weights: dict[str, FoldedWeight] = {}
        self._without_room: dict[str, None] = {}
        self.b: dict[str, tuple[torch.Tensor, ...]] = {}
        for site, weight in weights.items():
            own = folded("allocate_adapters", weight)
            if own.spec.rank_rows < rank_rows:
                self._without_room[site] = None
                continue
            self._weights[site] = own
            lead = () if own.spec.experts is None else (own.spec.experts,)
            widths = [_widths(own.spec, i)[1] for i in range(len(own.spec.slices))]
            self.b[site] = tuple(torch.zeros((*lead, rank_rows, width), dtype=own.spec.dtype) for width in widths)
        self.spans = torch.zeros((slots, 2), dtype=torch.int32)
        self._ranges: list[SlotRange | None] = [None] * slots
        self._ranks: list[dict[Module, int]] = [{} for _ in range(slots)]

    def write(self, where: SlotRange, packed: PackedAdapter) -> Event:
        self.clear(where.slot)
        self._check_range(where)
        for entry in packed.entries:
            reason = self._refusal(where, entry)
            if reason is not None:
                raise OperatorError(
                    "AdapterStore.write", f"slot {where.slot}, site {entry.site!r}, slice {entry.slice}: {reason}"
                )
        self._ranges[where.slot] = where
        self._ranks[where.slot] = {(e.site, e.slice, e.expert): e.rank for e in packed.entries}
        self._device.queue.put(lambda: self._scatter(where, packed))
        return self._device.record()

    def clear(self, slot: int) -> None:
        if not 0 <= slot < self.slots:
            raise OperatorError("AdapterStore", f"slot {slot} of {self.slots}")
        self._ranges[slot] = None
        self._ranks[slot] = {}
        self._device.queue.put(lambda: self.spans[slot].zero_())

    def ranges(self) -> Sequence[SlotRange | None]:
        return self._ranges

    def true_rank(self, site: str, slice_index: int, slot: int, expert: int | None = None) -> int:
        return self._ranks[slot].get((site, slice_index, expert), 0)

    def read(self, site: str, slice_index: int, slot: int, expert: int | None = None) -> LoraMatrices | None:
        rank, where = self.true_rank(site, slice_index, slot, expert), self._ranges[slot]
        if rank == 0 or where is None:
            return None
        self._device.queue.flush()
        a, b = self._rows(site, slice_index, expert, where.first_rank_row, rank)
        return LoraMatrices(a=a, b=b.T)

    @property
    def nbytes(self) -> int:
        b = sum(t.numel() * t.element_size() for parts in self.b.values() for t in parts)
        a = sum(w.buffer.numel() * w.buffer.element_size() - _base_bytes(w) for w in self._weights.values())
        return a + b

    def covers(self, site: str) -> bool:
        """Whether the site has room for adapters."""
        return site in self.b

    # -- inside --------------------------------------------------------------------------------------------------------

    def _rows(
        self, site: str, slice_index: int, expert: int | None, first: int, rows: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        b = self.b[site][slice_index]
        b = b if expert is None else b[expert]
        return self._weights[site].rank_rows(slice_index, first, rows, expert), b[first : first + rows]

    def _scatter(self, where: SlotRange, packed: PackedAdapter) -> None:
        entries = {(entry.site, entry.slice, entry.expert): entry for entry in packed.entries}
        for site, weight in self._weights.items():
            experts = weight.spec.experts
            for slice_index in range(len(weight.spec.slices)):
                for expert in (None,) if experts is None else range(experts):
                    a, b = self._rows(site, slice_index, expert, where.first_rank_row, where.rank_rows)
                    a.zero_()
                    b.zero_()
                    entry = entries.get((site, slice_index, expert))
                    if entry is not None:
                        a[: entry.rank].copy_(packed.a(entry))
                        b[: entry.rank].copy_(packed.b(entry).T)
        self.spans[where.slot].copy_(torch.tensor([where.first_rank_row, where.rank_rows]))

    def _check_range(self, where: SlotRange) -> None:
        first, end = where.first_rank_row, where.first_rank_row + where.rank_rows
        if first < 0 or where.rank_rows < 0 or end > self.rank_rows:
            raise OperatorError("AdapterStore.write", f"slot {where.slot}: rank rows {first}:{end} of {self.rank_rows}")
        for other in self._ranges:
            if other is not None and first < other.first_rank_row + other.rank_rows and other.first_rank_row < end:
                raise OperatorError("AdapterStore.write", f"slot {where.slot}: rank rows {first}:{end} overlap {other}")

    def _refusal(self, where: SlotRange, entry: PackedEntry) -> str | None:
        if entry.site in self._without_room:
            return "the weight has no room for adapters"
        if entry.site not in self._weights:
            return "the store has no such site"
        spec = self._weights[entry.site].spec
        if not 0 <= entry.slice < len(spec.slices):
            return f"the weight has {len(spec.slices)} slices"
        if (entry.expert is None) != (spec.experts is None) or not 0 <= (entry.expert or 0) < (spec.experts or 1):
            return f"expert {entry.expert} of {spec.experts}"
        if not 1 <= entry.rank <= where.rank_rows:
            return f"rank {entry.rank} in a range of {where.rank_rows} rank rows"
        width, height = _widths(spec, entry.slice)
        if entry.a_shape != (entry.rank, width) or entry.b_shape != (height, entry.rank):
            return f"a {entry.a_shape} and b {entry.b_shape}, expected {(entry.rank, width)} and {(height, entry.rank)}"
        return None


def _widths(spec: WeightSpec, slice_index: int) -> tuple[int, int]:
    """Columns of A and rows of B of one slice."""
    n = spec.slices[slice_index].n
    return (n, spec.k) if spec.lookup else (spec.k, n)


def _base_bytes(weight: FoldedWeight) -> int:
    return weight.nbytes - (0 if weight.bias is None else weight.bias.numel() * weight.bias.element_size())
