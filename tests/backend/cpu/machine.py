"""One CPU backend with weights, adapters, a paged cache and steps of its own, and bounds for its narrower dtypes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from polyaccel.backend.adapter_store import AdapterStore, PackedAdapter, SlotRange
from polyaccel.backend.cpu.backend import CpuBackend
from polyaccel.backend.kv_cache import KVCache, KVSpec
from polyaccel.backend.step import DeviceState, StepInput
from polyaccel.backend.weight import Weight, WeightSpec
from tests.backend.composite.cases import Draw, Module, f64, pack

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def intermediate(dtype: torch.dtype, magnitude: np.ndarray) -> np.ndarray:
    """Room for one intermediate kept in ``dtype`` (h of adapters, p of attention), as a magnitude for float32 sums."""
    widening = 1.0 if dtype == torch.float32 else torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
    return magnitude * widening


@dataclass
class Machine:
    """The backend and what has been allocated on it."""

    backend: CpuBackend = field(default_factory=CpuBackend)

    def operator(self, name: str) -> Callable[..., Any]:
        return self.backend.table()[name][0].fn

    def weight(self, spec: WeightSpec, draw: Draw, tied: Weight | None = None) -> tuple[Weight, np.ndarray]:
        """A sealed weight of random values, and those values ``[n, k]`` with the bias as one more column."""
        weight = self.backend.allocate_weight(spec, self.backend.devices()[0], tied)
        rows = []
        for i, part in enumerate(spec.slices):
            values = draw.tensor(part.n, spec.k, dtype=spec.dtype)
            bias = draw.tensor(part.n, dtype=spec.dtype) if spec.bias else torch.zeros(part.n, dtype=spec.dtype)
            weight.write(i, values)
            if spec.bias:
                weight.write_bias(i, bias)
            rows.append(np.concatenate((f64(values), f64(bias)[:, None]), axis=1))
        weight.seal()
        return weight, np.concatenate(rows)

    def store(
        self,
        weights: Mapping[str, Weight],
        modules: Mapping[int, Sequence[Module]],
        draw: Draw,
        *,
        slots: int = 6,
        gap: int = 1,
    ) -> tuple[AdapterStore, dict[int, PackedAdapter]]:
        """Adapters by slot, with ``gap`` rank rows of no slot between them and one more than needed in each range."""
        rows = {slot: max((m.rank for m in own), default=1) + gap for slot, own in modules.items()}
        total = sum(rows.values()) + gap * (len(rows) + 1)
        store = self.backend.allocate_adapters(weights, rank_rows=total, slots=slots, device=self.backend.devices()[0])
        first, packed = gap, {}
        for slot, own in modules.items():
            packed[slot] = pack(weights, own, draw)  # type: ignore[arg-type]
            store.write(SlotRange(slot=slot, first_rank_row=first, rank_rows=rows[slot]), packed[slot])
            first += rows[slot] + gap
        return store, packed

    def begin(self, inputs: StepInput, **state: Any) -> Any:
        return self.backend.begin_step(inputs, DeviceState(**state), self.backend.devices()[0])

    def cache(self, spec: KVSpec) -> KVCache:
        return self.backend.allocate_kv(spec, self.backend.devices()[0])


def deltas(
    x: np.ndarray,
    packed: Mapping[int, PackedAdapter],
    site: str,
    starts: Sequence[int],
    triples: Sequence[tuple[int, int, float]],
) -> tuple[np.ndarray, np.ndarray]:
    """What the triples add to y at a site, and a bound on the terms behind each element."""
    total = np.zeros((x.shape[0], starts[-1]))
    magnitude = np.zeros_like(total)
    for row, slot, mix in triples:
        for entry in packed[slot].entries if slot in packed else ():
            if entry.site == site:
                a, b = f64(packed[slot].a(entry)), f64(packed[slot].b(entry))
                columns = slice(starts[entry.slice], starts[entry.slice + 1])
                total[row, columns] += mix * (b @ (a @ x[row]))
                magnitude[row, columns] += abs(mix) * (np.abs(b) @ (np.abs(a) @ np.abs(x[row])))
    return total, magnitude


def columns_first(x: torch.Tensor) -> torch.Tensor:
    """The same values with the first dimension dense in memory."""
    return x.t().contiguous().t()
