"""Adapters: A under the weights, B beside them; sites with experts or quantised weights as plain tensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from polyaccel.backend import Device, Event, PackedAdapter, SlotRange, Weight, WeightSpec
from polyaccel.backend.composite.adapter_store import SiteBuffers, TensorAdapterStore
from polyaccel.backend.errors import ConfigurationError
from polyaccel_cuda.kernels.few import gathers
from polyaccel_cuda.weight import FoldedWeight


class CudaAdapterStore(TensorAdapterStore):
    """Slots own the same rank rows at every site.

    Attributes:
        b: by site ``[rank_rows, n]`` dense, the slices side by side (``[rank_rows, hidden]`` of a table).
        lookup: by site of a table, ``[vocabulary rows, rank_rows]``: A transposed, so that an id is a row.
        spans: ``[slots, 2]`` int32 on the device, first rank row and how many; 0 of them where a slot is empty.
        ranks: by site ``[slots, slices]`` int32 on the device, rows of one table: the true rank of each slice.
    """

    def __init__(self, weights: Mapping[str, Weight], *, rank_rows: int, slots: int, device: Device) -> None:
        self._folded = {site: weight for site, weight in weights.items() if isinstance(weight, FoldedWeight)}
        self.b: dict[str, torch.Tensor] = {}
        self.lookup: dict[str, torch.Tensor] = {}
        super().__init__(weights, rank_rows=rank_rows, slots=slots, device=device)
        self.spans = device.zeros((slots, 2), torch.int32)
        self._columns: dict[tuple[str, int], int] = {}
        for site in self.b:
            for part in range(len(self._specs[site].slices)):
                self._columns[site, part] = len(self._columns)
        self._ranks_table = device.zeros((slots, max(1, len(self._columns))), torch.int32)
        self.ranks: dict[str, torch.Tensor] = {}
        for site in self.b:
            first = self._columns[site, 0]
            self.ranks[site] = self._ranks_table[:, first : first + len(self._specs[site].slices)]

    def write(self, where: SlotRange, packed: PackedAdapter) -> Event:
        super().write(where, packed)
        ranks = torch.zeros(self._ranks_table.shape[1], dtype=torch.int32)
        for (site, part), column in self._columns.items():
            ranks[column] = self.true_rank(site, part, where.slot)
        with self._device.scope():
            self.spans[where.slot].copy_(torch.tensor([where.first_rank_row, where.rank_rows], dtype=torch.int32))
            self._ranks_table[where.slot].copy_(ranks)
            return self._device.record()

    def clear(self, slot: int) -> None:
        super().clear(slot)
        with self._device.scope():
            self.spans[slot].zero_()
            self._ranks_table[slot].zero_()

    def graph_rank_rows(self, slots: Collection[int], rows: int) -> int:
        if not gathers(rows):
            return super().graph_rank_rows(slots, rows)
        ranges = self.ranges()
        return sum(r.rank_rows for slot in slots if (r := ranges[slot]) is not None)

    def covers(self, site: str) -> bool:
        """Whether the site has room for adapters in this store's own form."""
        return site in self.b

    def _allocate(self, spec: WeightSpec) -> SiteBuffers:
        weight = self._folded.get(spec.site)
        if weight is not None:
            if spec.rank_rows < self.rank_rows:
                raise ConfigurationError(
                    f"weight {spec.site!r} has room for {spec.rank_rows} rank rows, the store for {self.rank_rows}"
                )
            slices, starts = len(spec.slices), spec.starts
            a = weight.rank_matrix(self.rank_rows)[: self.rank_rows * slices].view(self.rank_rows, slices, spec.k)
            b = self.b[spec.site] = self._device.zeros((self.rank_rows, spec.n), spec.dtype)
            return SiteBuffers(a=a.transpose(0, 1), b=tuple(b[:, starts[i] : starts[i + 1]] for i in range(slices)))
        if spec.lookup and spec.experts is None:
            a = self.lookup[spec.site] = self._device.zeros((spec.n, self.rank_rows), spec.dtype)
            b = self.b[spec.site] = self._device.zeros((self.rank_rows, spec.k), spec.dtype)
            return SiteBuffers(a=a.T.unsqueeze(0), b=(b,))
        return super()._allocate(spec)

    @property
    def nbytes(self) -> int:
        return super().nbytes + self.spans.numel() * self.spans.element_size()
