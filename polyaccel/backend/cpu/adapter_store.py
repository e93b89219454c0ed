"""Adapters in memory, and the plans by which steps apply them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from polyaccel.backend.adapter_store import LoraMatrices, PackedAdapter, PackedEntry, SlotRange
from polyaccel.backend.composite.adapter_store import Module, SiteBuffers, TensorAdapterStore
from polyaccel.backend.cpu.lora_plan import AdapterPlan
from polyaccel.backend.cpu.slot_matrices import SlotMatrices
from polyaccel.backend.device import Device, Event
from polyaccel.backend.step import AdapterRows
from polyaccel.backend.weight import Weight

PLANS_KEPT = 16

Signature = tuple[bytes, bytes, bytes]


class SlotMajorAdapterStore(TensorAdapterStore):
    """Linear sites are laid out slot by slot (:class:`SlotMatrices`), embeddings and experts as in the base class.

    Plans are kept from step to step: as long as the same rows use the same slots they stay the same. Loading or
    clearing any slot drops them.

    Attributes:
        linear: the linear sites.
    """

    def __init__(self, weights: Mapping[str, Weight], *, rank_rows: int, slots: int, device: Device) -> None:
        plain = {site: w for site, w in weights.items() if w.spec.experts is not None or w.spec.lookup}
        super().__init__(plain, rank_rows=rank_rows, slots=slots, device=device)
        self._plans: OrderedDict[Signature, AdapterPlan] = OrderedDict()
        self.linear: dict[str, SlotMatrices] = {}
        self._specs = {site: weight.spec for site, weight in weights.items()}
        for site, spec in self._specs.items():
            if site not in plain and spec.rank_rows > 0:
                matrices = self.linear[site] = SlotMatrices.allocate(spec, rank_rows)
                self.sites[site] = SiteBuffers(a=matrices.a, b=(matrices.b,))

    def write(self, where: SlotRange, packed: PackedAdapter) -> Event:
        self._plans.clear()
        return super().write(where, packed)

    def clear(self, slot: int) -> None:
        self._plans.clear()
        super().clear(slot)

    def read(self, site: str, slice_index: int, slot: int, expert: int | None = None) -> LoraMatrices | None:
        matrices = self.linear.get(site)
        if matrices is None:
            return super().read(site, slice_index, slot, expert)
        rank, where = self.true_rank(site, slice_index, slot, expert), self._ranges[slot]
        if rank == 0 or where is None:
            return None
        return matrices.read(slice_index, where.first_rank_row, where.rank_rows, rank)

    def plan(self, triples: AdapterRows) -> AdapterPlan:
        """How these triples are applied; the same object as long as no slot changes."""
        signature = (triples.rows.tobytes(), triples.slots.tobytes(), triples.weights.tobytes())
        found = self._plans.get(signature)
        if found is None:
            found = self._plans[signature] = AdapterPlan(self, triples)
            if len(self._plans) > PLANS_KEPT:
                self._plans.popitem(last=False)
        else:
            self._plans.move_to_end(signature)
        return found

    def touches(self, site: str, slot: int) -> bool:
        """Whether the slot's adapter has a module at a linear site."""
        ranks = self._ranks[slot]
        return any(ranks.get((site, index, None), 0) for index in range(len(self._specs[site].slices)))

    def _scatter(self, where: SlotRange, packed: PackedAdapter, modules: Mapping[Module, PackedEntry]) -> None:
        everything, self.sites = self.sites, {s: b for s, b in self.sites.items() if s not in self.linear}
        try:
            super()._scatter(where, packed, modules)
        finally:
            self.sites = everything
        first, rows = where.first_rank_row, where.rank_rows
        for site, matrices in self.linear.items():
            entries = [modules.get((site, index, None)) for index in range(matrices.slices)]
            if any(entry is None or entry.rank < rows for entry in entries):
                matrices.a_of(first, rows).zero_()
                matrices.b_of(first, rows).zero_()
            for index, entry in enumerate(entries):
                if entry is not None:
                    matrices.write(index, first, rows, packed.a(entry), packed.b(entry))
