"""The backend object: everything together."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

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
    Launcher,
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
from polyaccel.backend.composite.linear import dequantize
from polyaccel_cuda.evidence import evidence
from polyaccel_cuda.kv_cache import BLOCK_SIZE, BlockMajorKVCache
from polyaccel_cuda.sampling_state import CudaSamplingState
from polyaccel_cuda.support import supports
from polyaccel_cuda.weight import allocate

if TYPE_CHECKING:
    from polyaccel_cuda.step import StepLoader


class CudaBackend(Backend):
    """NVIDIA GPUs of compute capability 8.0 and above.

    Kernels, and Triton with them, are imported when operators are first asked for.
    """

    name = "cuda"
    priority = 100
    fork_safe = False

    def __init__(self) -> None:
        super().__init__()
        self.launcher = Launcher(self.ledger, enter=torch.cuda.device, is_current=_is_current)
        self._devices: tuple[Device, ...] | None = None
        self._loaders: dict[int, StepLoader] = {}
        self._pool: object | None = None
        self._world_size = 1

    def probe(self) -> Availability:
        if not torch.cuda.is_available():
            return Availability(usable=False, reason="torch finds no CUDA device", hardware=False)
        names = tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        for i, name in enumerate(names):
            if torch.cuda.get_device_capability(i) < (8, 0):
                reason = f"device {i} ({name}) has compute capability below 8.0"
                return Availability(usable=False, reason=reason, hardware=True, devices=names)
        if importlib.util.find_spec("triton") is None:
            reason = "triton is not installed: python -m pip install 'polyaccel[cuda]'"
            return Availability(usable=False, reason=reason, hardware=True, devices=names)
        return Availability(usable=True, hardware=True, devices=names)

    def devices(self) -> Sequence[Device]:
        if self._devices is None:
            from polyaccel_cuda.device import CudaDevice

            self._devices = tuple(CudaDevice(i) for i in range(torch.cuda.device_count()))
        return self._devices

    def operators(self) -> Mapping[str, Implementations]:
        from polyaccel_cuda.operators import CudaOperators
        from polyaccel_cuda.stations import CudaStations

        own: dict[str, Callable[..., object]] = {
            **CudaOperators(self.launcher).table(),
            **CudaStations(self.launcher).table(),
            "dequantize": dequantize,
        }
        return {
            name: Entry(
                fn,
                supports=supports(name),
                evidence=evidence(name),
                name=f"cuda.{name}",
                detail="ride" if name.startswith("row_parallel") else "",
            )
            for name, fn in own.items()
        }

    # -- memory ------------------------------------------------------------------------------------------------------

    def allocate_weight(self, spec: WeightSpec, device: Device, tied: Weight | None = None) -> Weight:
        return allocate(spec, device, tied)

    def allocate_adapters(
        self, weights: Mapping[str, Weight], *, rank_rows: int, slots: int, device: Device
    ) -> AdapterStore:
        from polyaccel_cuda.adapter_store import CudaAdapterStore

        return CudaAdapterStore(weights, rank_rows=rank_rows, slots=slots, device=device)

    def kv_block_size(self) -> int:
        return BLOCK_SIZE

    def allocate_kv(self, spec: KVSpec, device: Device) -> KVCache:
        return BlockMajorKVCache(spec, device)

    def allocate_sampling(self, spec: SamplingSpec, device: Device) -> SamplingState:
        return CudaSamplingState(spec, device)

    # -- stepping ----------------------------------------------------------------------------------------------------

    def begin_step(self, inputs: StepInput, state: DeviceState, device: Device) -> Step:
        from polyaccel_cuda.step import StepLoader

        loader = self._loaders.get(device.index)
        if loader is None:
            loader = self._loaders[device.index] = StepLoader(device, self.launcher)
        return loader.begin(inputs, state)

    def graph_refusals(self) -> list[Reason]:
        return ["ranks talk through host memory, which no graph holds"] if self._world_size > 1 else []

    def capture(self, key: GraphKey, fn: StepFunction, step: Step) -> Graph:
        from polyaccel_cuda.graph import CudaGraph
        from polyaccel_cuda.step import CudaStep

        own = CudaStep.of("capture", step)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = CudaGraph(key, fn, self.ledger, self._pool)
        graph.capture(own)
        return graph

    def connect(self, address: RankAddress) -> Communicator:
        self._world_size = address.world_size
        return super().connect(address)


def _is_current(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.current_device() == device.index
