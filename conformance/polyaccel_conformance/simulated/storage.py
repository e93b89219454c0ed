"""What a device holds between steps. Host-side answers are of now; what kernels see changes in the stream's order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from polyaccel.backend import (
    Event,
    KVSpec,
    Launcher,
    LoraMatrices,
    OperatorError,
    PackedAdapter,
    PackedEntry,
    SamplingRow,
    SamplingSpec,
    SlotRange,
    Weight,
)
from polyaccel.backend.composite.adapter_store import Module, SiteBuffers, TensorAdapterStore
from polyaccel.backend.composite.kv_cache import TensorKVCache
from polyaccel.backend.composite.sampling_state import StepNeeds, TensorSamplingState
from polyaccel.backend.composite.weight import TensorWeight
from polyaccel_conformance.simulated.device import SimulatedDevice
from polyaccel_conformance.simulated.launch import launch
from polyaccel_conformance.simulated.runtime import Runtime
from polyaccel_conformance.simulated.tensor import raw


class SimulatedKVCache(TensorKVCache):
    """The cache as one tensor; ``buffer`` is what guards look at."""

    def __init__(self, spec: KVSpec, device: SimulatedDevice, launcher: Launcher) -> None:
        super().__init__(spec, device)
        self._virtual, self._launcher = device, launcher

    @property
    def buffer(self) -> torch.Tensor:
        return self._rows

    def copy_blocks(self, sources: Sequence[int], destinations: Sequence[int]) -> None:
        if len(sources) != len(destinations):
            raise OperatorError("KVCache.copy_blocks", f"{len(sources)} sources for {len(destinations)} destinations")
        for block in (*sources, *destinations):
            if not 0 <= block < self.spec.blocks:
                raise OperatorError("KVCache.copy_blocks", f"block {block} of {self.spec.blocks}")
        read, written = torch.tensor(list(sources)), torch.tensor(list(destinations))

        def copy() -> None:
            blocks = self._by_block()
            blocks.index_copy_(2, written.long(), blocks.index_select(2, read.long()))

        if sources:
            launch(self._launcher, "simulated.copy_kv_blocks", {"kv": self._rows}, copy)


class SimulatedAdapterStore(TensorAdapterStore):
    """One copy of the packed buffer, one kernel that scatters it; the table that kernels read changes with them."""

    def __init__(
        self, weights: Mapping[str, Weight], *, rank_rows: int, slots: int, device: SimulatedDevice, launcher: Launcher
    ) -> None:
        super().__init__(weights, rank_rows=rank_rows, slots=slots, device=device)
        self._virtual, self._launcher = device, launcher
        self._resident: list[tuple[SlotRange | None, dict[Module, int]]] = [(None, {}) for _ in range(slots)]

    def write(self, where: SlotRange, packed: PackedAdapter) -> Event:
        self.clear(where.slot)
        self._check_range(where)
        modules = self._check_entries(where, packed)
        ranks = {module: entry.rank for module, entry in modules.items()}
        staged = self._virtual.upload_later(packed.buffer)
        self._ranges[where.slot], self._ranks[where.slot] = where, ranks
        first = next(iter(self.sites.values()), None)

        def scatter() -> None:
            held = PackedAdapter(buffer=staged, entries=packed.entries, max_rank=packed.max_rank)
            self._place(where, held, modules)
            self._resident[where.slot] = (where, ranks)

        operands = {"packed": staged, "store": None if first is None else first.a}
        launch(self._launcher, "simulated.scatter_adapter", operands, scatter)
        return self._device.record()

    def clear(self, slot: int) -> None:
        super().clear(slot)

        def empty() -> None:
            self._resident[slot] = (None, {})

        buffers = next(iter(self.sites.values()), None)
        if buffers is not None:
            launch(self._launcher, "simulated.clear_slot", {"store": buffers.a}, empty)

    def read(self, site: str, slice_index: int, slot: int, expert: int | None = None) -> LoraMatrices | None:
        if self._virtual.runtime.kernel_device is None:
            return super().read(site, slice_index, slot, expert)
        where, ranks = self._resident[slot]
        rank = ranks.get((site, slice_index, expert), 0)
        if rank == 0 or where is None:
            return None
        a, b = self.sites[site].rows(slice_index, expert, where.first_rank_row, rank)
        return LoraMatrices(a=a, b=b.T)

    def _place(self, where: SlotRange, packed: PackedAdapter, modules: Mapping[Module, PackedEntry]) -> None:
        """Inside of a kernel: every site's rows of the range, zero where the adapter has none."""
        device = self._virtual.virtual
        source = PackedAdapter(buffer=raw(packed.buffer, device), entries=packed.entries, max_rank=packed.max_rank)
        for site, held in self.sites.items():
            experts = self._specs[site].experts
            buffers = SiteBuffers(a=raw(held.a, device), b=tuple(raw(b, device) for b in held.b))
            for index in range(len(buffers.b)):
                for expert in (None,) if experts is None else range(experts):
                    a, b = buffers.rows(index, expert, where.first_rank_row, where.rank_rows)
                    a.zero_()
                    b.zero_()
                    entry = modules.get((site, index, expert))
                    if entry is not None:
                        a[: entry.rank].copy_(source.a(entry))
                        b[: entry.rank].copy_(source.b(entry).T)


class SimulatedSamplingState(TensorSamplingState):
    """``wants_logprobs`` answers as of now; the state itself changes in the stream's order."""

    def __init__(self, spec: SamplingSpec, device: SimulatedDevice, launcher: Launcher) -> None:
        self._virtual, self._launcher = device, launcher
        self._asked: dict[int, StepNeeds] = {}
        super().__init__(spec, device)

    def write(self, slot: int, row: SamplingRow) -> None:
        self._check_slot(slot)
        self._asked.pop(slot, None)
        self._check_ids(slot, row)
        self._asked[slot] = StepNeeds.of(row)
        self._launch("simulated.write_sampling_row", lambda: TensorSamplingState.write(self, slot, row))

    def clear(self, slot: int) -> None:
        self._check_slot(slot)
        if self._virtual.runtime.kernel_device is not None:
            super().clear(slot)
            return
        self._asked.pop(slot, None)
        self._launch("simulated.clear_sampling_row", lambda: TensorSamplingState.clear(self, slot))

    @property
    def runtime(self) -> Runtime:
        return self._virtual.runtime

    def wants_logprobs(self, slots: Sequence[int]) -> bool:
        return any(self._asked[slot].logprobs for slot in slots if slot in self._asked)

    def _launch(self, kernel: str, effect: Callable[[], object]) -> None:
        launch(self._launcher, kernel, {"state": self.parameters}, effect)


def weight_tensors(weight: Weight, name: str = "weight") -> dict[str, torch.Tensor | None]:
    """The device tensors of a weight, for guards and errors.

    Raises:
        OperatorError: another backend's weight.
    """
    if not isinstance(weight, TensorWeight):
        raise OperatorError(name, f"takes a TensorWeight, not the {type(weight).__name__} of {weight.spec.site!r}")
    stored = weight.quantised
    parts = {name: weight.tensor} if stored is None else {name: stored.codes, f"{name}.scales": stored.scales}
    return {**parts, f"{name}.bias": weight.bias}
