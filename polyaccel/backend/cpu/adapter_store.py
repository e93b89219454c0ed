"""Adapters laid out so that the slots of a step are one strided batch of matrices."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import torch

from polyaccel.backend.adapter_store import PackedAdapter, SlotRange
from polyaccel.backend.composite.adapter_store import SiteBuffers, TensorAdapterStore
from polyaccel.backend.cpu.lora_plan import AdapterPlan, SegmentRanks
from polyaccel.backend.device import Device, Event
from polyaccel.backend.step import AdapterRows
from polyaccel.backend.weight import Weight

PLANS_KEPT = 16

Signature = tuple[bytes, bytes, bytes]


class RankMajorAdapterStore(TensorAdapterStore):
    """A of all slices of a rank row lies together (``[rank_rows, slices, k]``), so that a slot is one run of rows.

    Plans are kept from step to step: as long as the same rows use the same slots they stay the same. Loading or
    clearing any slot drops them.
    """

    def __init__(self, weights: Mapping[str, Weight], *, rank_rows: int, slots: int, device: Device) -> None:
        super().__init__(weights, rank_rows=rank_rows, slots=slots, device=device)
        self._plans: OrderedDict[Signature, AdapterPlan] = OrderedDict()
        for site, spec in self._specs.items():
            if site in self.sites and spec.experts is None and not spec.lookup and len(spec.slices) > 1:
                rank_major = device.zeros((rank_rows, len(spec.slices), spec.k), spec.dtype)
                self.sites[site] = SiteBuffers(a=rank_major.transpose(0, 1), b=self.sites[site].b)

    def write(self, where: SlotRange, packed: PackedAdapter) -> Event:
        self._plans.clear()
        return super().write(where, packed)

    def clear(self, slot: int) -> None:
        self._plans.clear()
        super().clear(slot)

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

    def segment_ranks(self, site: str, slots: list[int]) -> list[SegmentRanks]:
        """Where each slot's rank rows begin at a site and how many it uses; rank 0 where it is untouched."""
        slices = len(self._specs[site].slices)
        found = []
        for slot in slots:
            where = self._ranges[slot]
            ranks = self._ranks[slot]
            by_slice = tuple(ranks.get((site, i, None), 0) for i in range(slices))
            found.append(SegmentRanks(0 if where is None else where.first_rank_row, max(by_slice), by_slice))
        return found

    def a_rows(self, site: str) -> torch.Tensor:
        """View ``[rank_rows, slices, k]`` of a site's A."""
        return self.sites[site].a.transpose(0, 1)
