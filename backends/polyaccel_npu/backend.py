"""The backend object: everything together."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING
from weakref import WeakSet

import torch

from polyaccel.backend import (
    AdapterStore,
    Availability,
    Backend,
    BackendUnavailable,
    Communicator,
    Device,
    DeviceState,
    Entry,
    Graph,
    GraphKey,
    KVCache,
    KVSpec,
    Launcher,
    Query,
    RankAddress,
    Reason,
    SamplingSpec,
    SamplingState,
    Step,
    StepFunction,
    StepInput,
    UnsupportedError,
    Weight,
    WeightSpec,
)
from polyaccel.backend.backend import Implementations
from polyaccel.backend.composite import operators as composite
from polyaccel.backend.composite.captured_sampling import CapturedSamplingState
from polyaccel.backend.errors import ConfigurationError
from polyaccel_npu import cann, runtime
from polyaccel_npu.evidence import evidence
from polyaccel_npu.health import Health
from polyaccel_npu.issue import Issuer
from polyaccel_npu.journal import Journal
from polyaccel_npu.support import supports

if TYPE_CHECKING:
    from polyaccel_npu.chip import Chip
    from polyaccel_npu.communicator import NpuCommunicator
    from polyaccel_npu.device import NpuDevice
    from polyaccel_npu.graph import NpuGraph
    from polyaccel_npu.step import StepLoader

SGMV = ("grouped", "vllm-ascend")
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "barrier")


class NpuBackend(Backend):
    """Huawei Ascend NPUs through torch_npu, whose import waits until a device is asked for.

    All ranks have equal shapes: the documents of the fused operators say nothing of ranks whose shapes differ.

    Args:
        blame: remember each step's calls, and after an asynchronous failure repeat them in a child with
            ASCEND_LAUNCH_BLOCKING=1 to name the one that fails. Costs host time on every call.
        sgmv: what does adapters where a graph does not: ``grouped`` for grouped matmul, ``vllm-ascend`` for the kernels
            of that project where they take a call. They have to be installed.

    Raises:
        ConfigurationError: another ``sgmv``.

    Attributes:
        health: whether the devices' results can be trusted.
    """

    name = "npu"
    priority = 90
    fork_safe = False
    needs_equal_shards = True

    def __init__(self, *, blame: bool = False, sgmv: str = "grouped") -> None:
        super().__init__()
        if sgmv not in SGMV:
            raise ConfigurationError(f"sgmv={sgmv!r}; it is one of {', '.join(SGMV)}")
        self._kernels = sgmv != SGMV[0]
        self.launcher = Launcher(self.ledger, enter=_entered, is_current=_is_current)
        journal = Journal() if blame else None
        self.health = Health(None if journal is None else functools.partial(self._blame, journal))
        self._issuer = Issuer(self.launcher, self.health, journal)
        self._devices: tuple[NpuDevice, ...] | None = None
        self._loaders: dict[int, StepLoader] = {}
        self._groups: list[NpuCommunicator] = []
        self._own_device: int | None = None
        self._pool: object | None = None
        self._graphs: WeakSet[NpuGraph] = WeakSet()

    @property
    def simulated(self) -> bool:  # type: ignore[override]
        """Whether the devices are simulated ones; asks torch_npu for its libraries."""
        return runtime.simulated()

    def probe(self) -> Availability:
        from polyaccel_npu.probe import probe

        return probe()

    def devices(self) -> Sequence[Device]:
        return self._all_devices()

    def _all_devices(self) -> tuple[NpuDevice, ...]:
        if self._devices is None:
            from polyaccel_npu.device import NpuDevice

            try:
                npu = runtime.npu()
            except (ImportError, OSError, RuntimeError) as error:
                raise BackendUnavailable(self.probe().reason or str(error)) from error
            too_old = cann.refusal(cann.version(), cann.exports)
            if too_old:
                raise BackendUnavailable(too_old)
            if self._kernels:
                from polyaccel_npu.vllm_sgmv import require

                require()
            self._devices = tuple(NpuDevice(i, self._issuer) for i in range(npu.device_count()))
        return self._devices

    def operators(self) -> Mapping[str, Implementations]:
        from polyaccel_npu.operators import NpuOperators
        from polyaccel_npu.stations import NpuStations

        self._groups = [group for group in self._groups if not group.closed]
        chip, exports = self._all_devices()[self._own_device or 0].chip, functools.cache(cann.exports)
        operators = NpuOperators(self._issuer)
        stations = NpuStations(self._issuer, operators, self._groups)
        own: dict[str, Callable[..., object]] = {**operators.table(), **stations.table()}
        entries: dict[str, Implementations] = {
            name: Entry(fn, supports=supports(name, chip, exports), evidence=evidence(name), name=f"npu.{name}")
            for name, fn in own.items()
        }
        sums = self._groups[0].describe() if self._groups else ""
        pairs: dict[str, tuple[Callable[..., object], Callable[..., object]]] = {
            "row_parallel_linear": (stations.fused_linear, stations.row_parallel_linear),
            "row_parallel_add_norm": (stations.fused_add_norm, stations.row_parallel_add_norm),
        }
        for name, (fused, parts) in pairs.items():
            rules = supports(name, chip, exports)
            detail = f"adapters add (x3), {sums}" if sums else "adapters add (x3)"
            entries[name] = (
                Entry(
                    fused,
                    supports=functools.partial(self._fused_refusals, rules),
                    evidence=evidence(name),
                    name="npu.mm_all_reduce",
                    detail=detail,
                ),
                Entry(
                    parts,
                    supports=rules,
                    evidence=evidence(name),
                    name="npu.matmul+hccl_all_reduce",
                    detail=f"adapters add, {sums}" if sums else "adapters add",
                ),
            )
        for name in COLLECTIVES:
            detail = sums if name == "all_reduce" else ""
            entries[name] = Entry(getattr(composite, name), evidence=evidence(name), name=f"npu.{name}", detail=detail)
        return self._with_kernels(entries, chip) if self._kernels else entries

    def _with_kernels(self, entries: dict[str, Implementations], chip: Chip) -> dict[str, Implementations]:
        """Before each entry the same with vllm-ascend's adapters, where there are any."""
        from polyaccel_npu import vllm_sgmv
        from polyaccel_npu.operators import NpuOperators
        from polyaccel_npu.stations import NpuStations

        operators = NpuOperators(self._issuer, vllm_sgmv.VllmLora(self._issuer))
        stations = NpuStations(self._issuer, operators, self._groups)
        table: dict[str, tuple[Callable[..., object], ...]] = {
            "sgmv": (operators.lora.sgmv,),
            "column_linear": (stations.column_linear,),
            "gate_up_act": (stations.gate_up_act,),
            "row_parallel_linear": (stations.fused_linear, stations.row_parallel_linear),
            "row_parallel_add_norm": (stations.fused_add_norm, stations.row_parallel_add_norm),
        }
        for name, functions in table.items():
            given = entries[name]
            plain = (given,) if isinstance(given, Entry) else tuple(given) if not callable(given) else ()
            pairs = zip(functions, plain, strict=True)
            entries[name] = [one for fn, entry in pairs for one in (vllm_sgmv.before(entry, fn, chip), entry)]
        return entries

    def _fused_refusals(self, rules: Callable[[Query], list[Reason]], query: Query) -> list[Reason]:
        from polyaccel_npu.fused import refusals

        if self._groups:
            chips, fused = self._groups[0].chips, self._groups[0].fused_chips
        else:
            chip = self._all_devices()[0].chip
            chips, fused = (chip.family,), chip.fused_all_reduce
        return [*rules(query), *refusals(query, self._groups, chips, fused)]

    # -- memory ------------------------------------------------------------------------------------------------------

    def allocate_weight(self, spec: WeightSpec, device: Device, tied: Weight | None = None) -> Weight:
        from polyaccel_npu.weight import allocate

        return allocate(spec, device, tied)

    def allocate_adapters(
        self, weights: Mapping[str, Weight], *, rank_rows: int, slots: int, device: Device
    ) -> AdapterStore:
        from polyaccel_npu.adapter_store import NpuAdapterStore
        from polyaccel_npu.vllm_sgmv import VllmAdapterStore

        store = VllmAdapterStore if self._kernels else NpuAdapterStore
        return store(weights, rank_rows=rank_rows, slots=slots, device=device)

    def kv_block_size(self) -> int:
        from polyaccel_npu.kv_cache import BLOCK_SIZE

        return BLOCK_SIZE

    def allocate_kv(self, spec: KVSpec, device: Device) -> KVCache:
        from polyaccel_npu.kv_cache import BlockKVCache

        return BlockKVCache(spec, device)

    def allocate_sampling(self, spec: SamplingSpec, device: Device) -> SamplingState:
        return CapturedSamplingState(spec, device)

    # -- stepping ----------------------------------------------------------------------------------------------------

    def begin_step(self, inputs: StepInput, state: DeviceState, device: Device) -> Step:
        from polyaccel_npu.step import StepLoader

        self.health.check()
        loader = self._loaders.get(device.index)
        if loader is None:
            loader = self._loaders[device.index] = StepLoader(device, self._issuer)
        with device.scope():
            step = loader.begin(inputs, state)
        if self._kernels:
            from polyaccel_npu.vllm_sgmv import prepare

            prepare(step)
        return step

    def graph_refusals(self) -> list[Reason]:
        from polyaccel_npu.graph import refusals

        return refusals(self._all_devices()[self._own_device or 0].chip)

    def capture(self, key: GraphKey, fn: StepFunction, step: Step) -> Graph:
        from polyaccel_npu.graph import capture, new_pool
        from polyaccel_npu.step import NpuStep

        refused = self.graph_refusals()
        if refused:
            raise UnsupportedError(f"no graph of {key}: {'; '.join(refused)}")
        if not any(graph.holds_memory for graph in self._graphs):
            # A pool ends with its last graph; torch_npu, as torch, refuses a capture into one that has ended.
            self._pool = new_pool(NpuStep.of("capture", step).device.torch_device)
        graph = capture(key, fn, step, self._issuer, self._pool)
        self._graphs.add(graph)
        return graph

    # -- ranks -------------------------------------------------------------------------------------------------------

    def connect(self, address: RankAddress) -> Communicator:
        """One NPU a rank. The first group that this instance joins says which: later ones number their ranks anew."""
        self._groups = [group for group in self._groups if not group.closed]
        if address.world_size == 1:
            return super().connect(address)
        from polyaccel_npu.communicator import NpuCommunicator

        devices = self._all_devices()
        if self._own_device is None:
            self._own_device = min(address.rank, len(devices) - 1)
        own = devices[self._own_device]
        group = NpuCommunicator(address, self._issuer, own.torch_device, own.chip)
        self._groups.append(group)
        return group

    def _blame(self, journal: Journal) -> str:
        from polyaccel_npu.replay import blame

        return blame(journal, self._own_device or 0, self.launcher.rank)

    def close(self) -> None:
        self._loaders.clear()
        super().close()


def _entered(device: torch.device) -> AbstractContextManager[object]:
    scope: AbstractContextManager[object] = runtime.npu().device(device)
    return scope


def _is_current(device: torch.device) -> bool:
    return device.type == "npu" and runtime.npu().current_device() == device.index
