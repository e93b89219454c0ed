"""A backend with some of its operators replaced: everything else, name and plan included, is the inner backend's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch

from polyaccel.backend import (
    AdapterStore,
    Availability,
    Backend,
    Communicator,
    Device,
    DeviceState,
    Entry,
    Graph,
    GraphKey,
    KVCache,
    KVSpec,
    RankAddress,
    Reason,
    SamplingSpec,
    SamplingState,
    Step,
    StepFunction,
    StepInput,
    Weight,
    WeightSpec,
)
from polyaccel.backend.backend import Implementations


class Overlay(Backend):
    """``Overlay(backend, {"linear": Entry(...)})``: these instead of the inner backend's entries.

    Ledger and launcher are the inner backend's; its operators, devices and storage cannot tell the difference.
    """

    def __init__(self, inner: Backend, replaced: Mapping[str, Entry | Sequence[Entry]] = MappingProxyType({})) -> None:
        self.inner = inner
        self.name = inner.name
        self.priority = inner.priority
        self.needs_equal_shards = inner.needs_equal_shards
        self.isolate, self.fork_safe, self.simulated = inner.isolate, inner.fork_safe, inner.simulated
        self.ledger, self.launcher = inner.ledger, inner.launcher
        self._replaced = dict(replaced)

    def probe(self) -> Availability:
        return self.inner.probe()

    def devices(self) -> Sequence[Device]:
        return self.inner.devices()

    def operators(self) -> Mapping[str, Implementations]:
        return {**self.inner.table(), **self._replaced}

    def composites(self) -> Mapping[str, Callable[..., object]]:
        return self.inner.composites()

    def allocate_weight(self, spec: WeightSpec, device: Device, tied: Weight | None = None) -> Weight:
        return self.inner.allocate_weight(spec, device, tied)

    def allocate_adapters(
        self, weights: Mapping[str, Weight], *, rank_rows: int, slots: int, device: Device
    ) -> AdapterStore:
        return self.inner.allocate_adapters(weights, rank_rows=rank_rows, slots=slots, device=device)

    def kv_block_size(self) -> int:
        return self.inner.kv_block_size()

    def allocate_kv(self, spec: KVSpec, device: Device) -> KVCache:
        return self.inner.allocate_kv(spec, device)

    def allocate_sampling(self, spec: SamplingSpec, device: Device) -> SamplingState:
        return self.inner.allocate_sampling(spec, device)

    def begin_step(self, inputs: StepInput, state: DeviceState, device: Device) -> Step:
        return self.inner.begin_step(inputs, state, device)

    def graph_refusals(self) -> list[Reason]:
        return self.inner.graph_refusals()

    def capture(self, key: GraphKey, fn: StepFunction, step: Step) -> Graph:
        return self.inner.capture(key, fn, step)

    def connect(self, address: RankAddress) -> Communicator:
        return self.inner.connect(address)

    def dequantize(self, weight: Weight) -> torch.Tensor:
        return self.inner.dequantize(weight)

    def close(self) -> None:
        self.inner.close()
