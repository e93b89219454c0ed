"""The CPU backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from polyaccel.backend.adapter_store import AdapterStore
from polyaccel.backend.backend import Availability, Backend, Implementations
from polyaccel.backend.composite.linear import dequantize
from polyaccel.backend.composite.operators import CompositeOperators
from polyaccel.backend.cpu.adapter_store import SlotMajorAdapterStore
from polyaccel.backend.cpu.evidence import evidence
from polyaccel.backend.cpu.kv_cache import HeadMajorKVCache
from polyaccel.backend.cpu.operators import CpuOperators
from polyaccel.backend.cpu.stations import CpuStations
from polyaccel.backend.cpu.step import CpuStep
from polyaccel.backend.cpu.support import supports
from polyaccel.backend.cpu.weight import PackedWeight
from polyaccel.backend.device import Device, TorchDevice
from polyaccel.backend.kv_cache import KVCache, KVSpec
from polyaccel.backend.step import DeviceState, Step, StepInput
from polyaccel.backend.support import Entry
from polyaccel.backend.weight import Weight, WeightSpec

KV_BLOCK_SIZE = 32


class CpuBackend(Backend):
    """Runs anywhere torch does. Every operator counts as native here: where it has no form of its own, the plain-torch
    one is what a CPU would run anyway.
    """

    name = "cpu"
    priority = 0
    isolate = False
    fork_safe = True

    def __init__(self) -> None:
        super().__init__()
        self._device = TorchDevice("cpu")

    def probe(self) -> Availability:
        return Availability(usable=True, devices=(self._device.name,))

    def devices(self) -> Sequence[Device]:
        return (self._device,)

    def operators(self) -> Mapping[str, Implementations]:
        operators = CpuOperators(self.launcher)
        stations = CpuStations(self.launcher, operators)
        own: dict[str, Callable[..., object]] = {
            **operators.table(),
            **stations.table(),
            "dequantize": self._launched("dequantize", dequantize),
        }
        plain = {
            name: self._launched(name, fn) for name, fn in CompositeOperators(self).table().items() if name not in own
        }
        return {
            name: Entry(fn, supports=supports(name), evidence=evidence(name)) for name, fn in {**own, **plain}.items()
        }

    def _launched(self, operator: str, fn: Callable[..., object]) -> Callable[..., object]:
        kernel, launcher = f"cpu.{operator}", self.launcher

        def plain(*args: object, **kwargs: object) -> object:
            tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
            if tensors:
                return launcher.launch(kernel, tensors, fn, *args, **kwargs)
            launcher.ledger.record(kernel)
            return fn(*args, **kwargs)

        return plain

    # -- memory ------------------------------------------------------------------------------------------------------

    def allocate_weight(self, spec: WeightSpec, device: Device, tied: Weight | None = None) -> Weight:
        return PackedWeight(spec, device, tied)

    def allocate_adapters(
        self, weights: Mapping[str, Weight], *, rank_rows: int, slots: int, device: Device
    ) -> AdapterStore:
        return SlotMajorAdapterStore(weights, rank_rows=rank_rows, slots=slots, device=device)

    def kv_block_size(self) -> int:
        return KV_BLOCK_SIZE

    def allocate_kv(self, spec: KVSpec, device: Device) -> KVCache:
        return HeadMajorKVCache(spec, device)

    def begin_step(self, inputs: StepInput, state: DeviceState, device: Device) -> Step:
        return CpuStep(inputs, state, device)
