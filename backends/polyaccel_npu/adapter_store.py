"""Adapters: A rows and B rows by rank row, B in float32 so that an adapter's sum is rounded once, with y."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from polyaccel.backend import (
    AdapterStore,
    LoraMatrices,
    PackedAdapter,
    PackedEntry,
    SlotRange,
    WeightSpec,
)
from polyaccel.backend.composite.adapter_store import Module, SiteBuffers, TensorAdapterStore


class NpuAdapterStore(TensorAdapterStore):
    """As the composite's, with ``b`` of linear sites in float32 (grouped matmul rounds its result to its operands'
    dtype, and a sum that is rounded before it is added to y is rounded twice).

    Values are the weight's dtype's whatever the file's.
    """

    def _allocate(self, spec: WeightSpec) -> SiteBuffers:
        if not wide_b(spec):
            return super()._allocate(spec)
        device, starts = self._device, spec.starts
        widths = [starts[i + 1] - starts[i] for i in range(len(spec.slices))] if not spec.lookup else [spec.k]
        inner = spec.n if spec.lookup else spec.k
        return SiteBuffers(
            a=device.zeros((len(widths), self.rank_rows, inner), spec.dtype),
            b=tuple(device.zeros((self.rank_rows, width), torch.float32) for width in widths),
        )

    def _scatter(self, where: SlotRange, packed: PackedAdapter, modules: Mapping[Module, PackedEntry]) -> None:
        super()._scatter(where, packed, modules)
        for (site, slice_index, expert), entry in modules.items():
            spec = self._specs[site]
            if wide_b(spec) and packed.buffer.dtype != spec.dtype:
                _, b = self.sites[site].rows(slice_index, expert, where.first_rank_row, entry.rank)
                b.copy_(b.to(spec.dtype))

    def read(self, site: str, slice_index: int, slot: int, expert: int | None = None) -> LoraMatrices | None:
        found = super().read(site, slice_index, slot, expert)
        spec = self._specs[site]
        if found is None or not wide_b(spec):
            return found
        return LoraMatrices(a=found.a, b=found.b.to(spec.dtype))

    def rows(self, site: str, slice_index: int, slot: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Views ``a: [rank, in]`` of the weight's dtype and ``b: [rank, out]`` float32; None where untouched."""
        rank, where = self.true_rank(site, slice_index, slot), self._ranges[slot]
        if rank == 0 or where is None:
            return None
        return self.sites[site].rows(slice_index, None, where.first_rank_row, rank)

    def covers(self, site: str) -> bool:
        """Whether the site has room for adapters in this store's own form."""
        return site in self.sites and wide_b(self._specs[site])


def wide_b(spec: WeightSpec) -> bool:
    """Whether B of this weight is float32: everything but experts, whose adapters the composite applies."""
    return spec.experts is None


def own_store(operator: str, store: AdapterStore | None) -> NpuAdapterStore:
    """The step's store as this backend's own.

    Raises:
        OperatorError: there is none, or it is another's.
    """
    from polyaccel.backend import OperatorError

    if not isinstance(store, NpuAdapterStore):
        raise OperatorError(operator, f"the step names adapters but its store is {type(store).__name__}")
    return store
