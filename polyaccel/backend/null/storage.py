"""Storage classes that store nothing but what the host needs to know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from polyaccel.backend.adapter_store import AdapterStore, LoraMatrices, PackedAdapter, SlotRange
from polyaccel.backend.device import DoneEvent, Event
from polyaccel.backend.kv_cache import KVCache, KVSpec
from polyaccel.backend.sampling import SamplingRow, SamplingSpec, SamplingState
from polyaccel.backend.weight import Weight, WeightSpec, check_write


class NullWeight(Weight):
    """Checks every write and drops the values."""

    torch_device = torch.device("meta")

    def __init__(self, spec: WeightSpec) -> None:
        self.spec = spec

    def write(
        self, slice_index: int, source: torch.Tensor, *, row: int = 0, col: int = 0, expert: int | None = None
    ) -> None:
        check_write(self.spec, slice_index, source.shape, row, col, expert)

    def write_bias(self, slice_index: int, source: torch.Tensor, *, row: int = 0, expert: int | None = None) -> None:
        return None

    def write_quantised(
        self,
        slice_index: int,
        codes: torch.Tensor,
        zeros: torch.Tensor,
        scales: torch.Tensor,
        *,
        row: int = 0,
        col: int = 0,
        expert: int | None = None,
    ) -> None:
        check_write(self.spec, slice_index, codes.shape, row, col, expert)

    def seal(self) -> None:
        return None

    def reopen(self) -> None:
        return None

    @property
    def nbytes(self) -> int:
        return 0


class NullKVCache(KVCache):
    """Blocks that hold nothing."""

    torch_device = torch.device("meta")

    def __init__(self, spec: KVSpec) -> None:
        self.spec = spec

    def write(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        return None

    def read(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (slots.shape[0], self.spec.kv_heads, self.spec.head_dim)
        empty = torch.empty(shape, dtype=self.spec.dtype, device="meta")
        return empty, empty

    def copy_blocks(self, sources: Sequence[int], destinations: Sequence[int]) -> None:
        return None

    @property
    def nbytes(self) -> int:
        return 0


class NullAdapterStore(AdapterStore):
    """Remembers ranges and ranks."""

    torch_device = torch.device("meta")

    def __init__(self, weights: Mapping[str, Weight], *, rank_rows: int, slots: int) -> None:
        self.slots, self.rank_rows = slots, rank_rows
        self._sites = frozenset(weights)
        self._ranges: list[SlotRange | None] = [None] * slots
        self._ranks: list[dict[tuple[str, int, int | None], int]] = [{} for _ in range(slots)]

    def write(self, where: SlotRange, packed: PackedAdapter) -> Event:
        self._ranges[where.slot] = where
        self._ranks[where.slot] = {(e.site, e.slice, e.expert): e.rank for e in packed.entries}
        return DoneEvent()

    def clear(self, slot: int) -> None:
        self._ranges[slot] = None
        self._ranks[slot] = {}

    def ranges(self) -> Sequence[SlotRange | None]:
        return self._ranges

    def true_rank(self, site: str, slice_index: int, slot: int, expert: int | None = None) -> int:
        return self._ranks[slot].get((site, slice_index, expert), 0)

    def read(self, site: str, slice_index: int, slot: int, expert: int | None = None) -> LoraMatrices | None:
        return None

    @property
    def nbytes(self) -> int:
        return 0


class NullSamplingState(SamplingState):
    """Keeps each request's seed on the host: scripted tokens are a function of seed and position."""

    torch_device = torch.device("meta")

    def __init__(self, spec: SamplingSpec) -> None:
        self.spec = spec
        self.seeds = np.zeros(spec.request_slots, dtype=np.uint64)
        self.rows: list[SamplingRow | None] = [None] * spec.request_slots

    def write(self, slot: int, row: SamplingRow) -> None:
        self.seeds[slot] = row.seed & 0xFFFFFFFFFFFFFFFF
        self.rows[slot] = row

    def clear(self, slot: int) -> None:
        self.rows[slot] = None

    def last_tokens(self) -> torch.Tensor:
        return torch.empty(self.spec.request_slots, dtype=torch.int64, device="meta")
