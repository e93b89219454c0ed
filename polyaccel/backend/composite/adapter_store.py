"""Adapters as plain tensors: one A and one B buffer a site, in which every slot owns the same rank rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from polyaccel.backend.adapter_store import AdapterStore, LoraMatrices, PackedAdapter, PackedEntry, SlotRange
from polyaccel.backend.device import Device, Event
from polyaccel.backend.errors import ConfigurationError, OperatorError
from polyaccel.backend.weight import Weight, WeightSpec

Module = tuple[str, int, int | None]
"""Site, slice and expert: what one pair of matrices adapts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteBuffers:
    """``a: [slices, rank_rows, in]`` and for each slice ``b: [rank_rows, out]``, with a leading ``experts`` where the
    weight has. B is transposed, so that a rank row is a row of both and all slots together are one matrix."""

    a: torch.Tensor
    b: tuple[torch.Tensor, ...]

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.a, *self.b))

    def rows(self, slice_index: int, expert: int | None, first: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views ``[rows, in]`` and ``[rows, out]``."""
        a, b = self.a, self.b[slice_index]
        if expert is not None:
            a, b = a[expert], b[expert]
        return a[slice_index, first : first + rows], b[first : first + rows]


class TensorAdapterStore(AdapterStore):
    """Storage for any torch device, in each weight's dtype.

    Rows of a slot's range beyond a module's rank, or of a module that the adapter does not touch, are zero. Rows of no
    range hold anything. Sites whose spec has no ``rank_rows`` get no room.

    Attributes:
        sites: the buffers by site.
    """

    def __init__(self, weights: Mapping[str, Weight], *, rank_rows: int, slots: int, device: Device) -> None:
        if rank_rows < 0 or slots < 0:
            raise ConfigurationError(f"an adapter store of {rank_rows} rank rows and {slots} slots; both must be >= 0")
        self.rank_rows = rank_rows
        self.slots = slots
        self.sites: dict[str, SiteBuffers] = {}
        self._specs = {site: weight.spec for site, weight in weights.items()}
        self._device = device
        self.torch_device = device.torch_device
        self._ranges: list[SlotRange | None] = [None] * slots
        self._ranks: list[dict[Module, int]] = [{} for _ in range(slots)]
        with device.scope():
            for site, spec in self._specs.items():
                if spec.rank_rows > 0:
                    self.sites[site] = self._allocate(spec)

    def write(self, where: SlotRange, packed: PackedAdapter) -> Event:
        self.clear(where.slot)
        self._check_range(where)
        modules = self._check_entries(where, packed)
        with self._device.scope():
            self._scatter(where, packed, modules)
            self._ranges[where.slot] = where
            self._ranks[where.slot] = {module: entry.rank for module, entry in modules.items()}
            return self._device.record()

    def clear(self, slot: int) -> None:
        if not 0 <= slot < self.slots:
            raise OperatorError("AdapterStore", f"slot {slot} of {self.slots}")
        self._ranges[slot] = None
        self._ranks[slot] = {}

    def ranges(self) -> Sequence[SlotRange | None]:
        return self._ranges

    def true_rank(self, site: str, slice_index: int, slot: int, expert: int | None = None) -> int:
        return self._ranks[slot].get((site, slice_index, expert), 0)

    def read(self, site: str, slice_index: int, slot: int, expert: int | None = None) -> LoraMatrices | None:
        rank = self._ranks[slot].get((site, slice_index, expert), 0)
        where = self._ranges[slot]
        if rank == 0 or where is None:
            return None
        a, b = self.sites[site].rows(slice_index, expert, where.first_rank_row, rank)
        return LoraMatrices(a=a, b=b.T)

    @property
    def nbytes(self) -> int:
        return sum(buffers.nbytes for buffers in self.sites.values())

    def _allocate(self, spec: WeightSpec) -> SiteBuffers:
        """Zeroed room at one site; subclasses may place it elsewhere."""
        return _allocate(spec, self.rank_rows, self._device)

    # -- writing -----------------------------------------------------------------------------------------------------

    def _scatter(self, where: SlotRange, packed: PackedAdapter, modules: Mapping[Module, PackedEntry]) -> None:
        source = packed.buffer
        if self._device.torch_device.type != "cpu":
            source = self._device.upload(source)
        for site, buffers in self.sites.items():
            experts = self._specs[site].experts
            for slice_index in range(len(buffers.b)):
                for expert in (None,) if experts is None else range(experts):
                    a, b = buffers.rows(slice_index, expert, where.first_rank_row, where.rank_rows)
                    entry = modules.get((site, slice_index, expert))
                    rank = 0 if entry is None else entry.rank
                    if entry is not None:
                        a[:rank].copy_(_matrix(source, entry.a_offset, entry.a_shape))
                        b[:rank].copy_(_matrix(source, entry.b_offset, entry.b_shape).T)
                    if rank < where.rank_rows:
                        a[rank:].zero_()
                        b[rank:].zero_()

    def _check_range(self, where: SlotRange) -> None:
        first, end = where.first_rank_row, where.first_rank_row + where.rank_rows
        if first < 0 or where.rank_rows < 0 or end > self.rank_rows:
            raise OperatorError("AdapterStore.write", f"slot {where.slot}: rank rows {first}:{end} of {self.rank_rows}")
        for other in self._ranges:
            if other is not None and first < other.first_rank_row + other.rank_rows and other.first_rank_row < end:
                raise OperatorError("AdapterStore.write", f"slot {where.slot}: rank rows {first}:{end} overlap {other}")

    def _check_entries(self, where: SlotRange, packed: PackedAdapter) -> dict[Module, PackedEntry]:
        modules: dict[Module, PackedEntry] = {}
        for entry in packed.entries:
            reason = self._refusal(where, packed, entry)
            module = (entry.site, entry.slice, entry.expert)
            if reason is None and module in modules:
                reason = "appears twice"
            if reason is not None:
                expert = "" if entry.expert is None else f", expert {entry.expert}"
                raise OperatorError(
                    "AdapterStore.write",
                    f"slot {where.slot}, site {entry.site!r}, slice {entry.slice}{expert}: {reason}",
                )
            modules[module] = entry
        return modules

    def _refusal(self, where: SlotRange, packed: PackedAdapter, entry: PackedEntry) -> str | None:
        spec = self._specs.get(entry.site)
        if spec is None:
            return "the store has no such site"
        if entry.site not in self.sites:
            return "the weight was allocated without room for adapters (rank_rows is 0)"
        if not 0 <= entry.slice < len(spec.slices):
            return f"the weight has {len(spec.slices)} slices"
        experts = spec.experts
        if (entry.expert is None) != (experts is None) or (
            entry.expert is not None and not 0 <= entry.expert < (experts or 0)
        ):
            return f"the weight has {experts} experts"
        if (entry.kind == "embedding") != spec.lookup:
            return f"an adapter of kind {entry.kind!r} on a weight with lookup={spec.lookup}"
        if not 1 <= entry.rank <= where.rank_rows:
            return f"rank {entry.rank} in a range of {where.rank_rows} rank rows"
        width, height = _widths(spec, entry.slice)
        if entry.a_shape != (entry.rank, width) or entry.b_shape != (height, entry.rank):
            return f"a {entry.a_shape} and b {entry.b_shape}, expected {(entry.rank, width)} and {(height, entry.rank)}"
        for offset, shape in ((entry.a_offset, entry.a_shape), (entry.b_offset, entry.b_shape)):
            if offset < 0 or offset + shape[0] * shape[1] > packed.buffer.numel():
                return f"elements {offset}:{offset + shape[0] * shape[1]} of a buffer of {packed.buffer.numel()}"
        return None


def _matrix(buffer: torch.Tensor, offset: int, shape: tuple[int, int]) -> torch.Tensor:
    return buffer[offset : offset + shape[0] * shape[1]].view(shape)


def _widths(spec: WeightSpec, slice_index: int) -> tuple[int, int]:
    """Columns of A and rows of B of one slice."""
    n = spec.slices[slice_index].n
    return (n, spec.k) if spec.lookup else (spec.k, n)


def _allocate(spec: WeightSpec, rank_rows: int, device: Device) -> SiteBuffers:
    if spec.lookup and len(spec.slices) != 1:
        raise ConfigurationError(f"embedding table {spec.site!r} has {len(spec.slices)} slices, expected 1")
    lead = () if spec.experts is None else (spec.experts,)
    width = _widths(spec, 0)[0]
    return SiteBuffers(
        a=device.zeros((*lead, len(spec.slices), rank_rows, width), spec.dtype),
        b=tuple(device.zeros((*lead, rank_rows, _widths(spec, i)[1]), spec.dtype) for i in range(len(spec.slices))),
    )
