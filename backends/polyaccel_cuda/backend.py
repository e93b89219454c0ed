"""The backend object: everything together."""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING
from weakref import WeakSet

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
from polyaccel.backend.composite.captured_sampling import CapturedSamplingState
from polyaccel.backend.composite.linear import dequantize
from polyaccel.backend.errors import ConfigurationError
from polyaccel_cuda.evidence import evidence
from polyaccel_cuda.kv_cache import BLOCK_SIZE, BlockMajorKVCache
from polyaccel_cuda.support import supports
from polyaccel_cuda.warm_up import WarmUp, prepare
from polyaccel_cuda.weight import allocate

if TYPE_CHECKING:
    from polyaccel_cuda.communicator import CudaCommunicator
    from polyaccel_cuda.flashinfer_plan import Planner
    from polyaccel_cuda.graph import CudaGraph
    from polyaccel_cuda.kernel_cache import KernelCache
    from polyaccel_cuda.step import StepLoader

logger = logging.getLogger("polyaccel.cuda")

ATTENTION = ("triton", "flashinfer")


class CudaBackend(Backend):
    """NVIDIA GPUs of compute capability 8.0 and above.

    Kernels, and Triton with them, are imported when operators are first asked for; on a GPU already beside the copy of
    the weights.

    Args:
        attention: what does paged attention where no graph does: ``triton`` for own kernels, ``flashinfer`` for the
            kernels of that project where they take a call. They have to be installed.

    Raises:
        ConfigurationError: another ``attention``.

    Attributes:
        kernels: what was read from the kernel cache and what was compiled; None until operators are asked for, and
            without a GPU.
    """

    name = "cuda"
    priority = 100
    fork_safe = False

    def __init__(self, *, attention: str = "triton") -> None:
        super().__init__()
        if attention not in ATTENTION:
            raise ConfigurationError(f"attention={attention!r}; it is one of {', '.join(ATTENTION)}")
        self._attention = attention
        self._planner: Planner | None = None
        self.launcher = Launcher(self.ledger, enter=torch.cuda.device, is_current=_is_current)
        self._devices: tuple[Device, ...] | None = None
        self._loaders: dict[int, StepLoader] = {}
        self._pool: object | None = None
        self._graphs: WeakSet[CudaGraph] = WeakSet()
        self._groups: list[CudaCommunicator] = []
        self._own_device: torch.device | None = None
        self._warm_up = WarmUp()
        self.kernels: KernelCache | None = None

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

            if self._attention == "flashinfer":
                from polyaccel_cuda.flashinfer import require

                require()
            self._devices = tuple(CudaDevice(i, self._check_groups) for i in range(torch.cuda.device_count()))
        return self._devices

    def require_batch_invariance(self) -> None:
        """Products by tiles in one form, attention without splits, adapters apart; see docs/cuda.md for what it costs.

        :meth:`connect` then refuses more than two ranks, :meth:`allocate_weight` experts.
        """
        if self._attention != "triton":
            raise ConfigurationError(f"batch_invariant: how {self._attention} cuts a context depends on the batch")
        self.batch_invariant = True

    def operators(self) -> Mapping[str, Implementations]:
        self._warm_up.finish()
        self._keep_kernels()
        from polyaccel_cuda.collectives import COLLECTIVES
        from polyaccel_cuda.operators import CudaOperators
        from polyaccel_cuda.stations import CudaStations

        sums = self._groups[0].describe() if self._groups else ""
        hosted = [group.hosted for group in self._groups if group.hosted]
        parts = self._groups[0].describe_parts() if self._groups else ""
        ride = f"ride; parts of large sums {parts}" if parts else "ride"
        own: dict[str, Callable[..., object]] = {
            **CudaOperators(self.launcher, batch_invariant=self.batch_invariant).table(),
            **CudaStations(self.launcher, batch_invariant=self.batch_invariant).table(),
            "dequantize": dequantize,
        }
        entries = {
            name: Entry(
                fn,
                supports=supports(name),
                evidence=evidence(name),
                name=f"cuda.{name}",
                detail=ride if name.startswith("row_parallel") else "",
            )
            for name, fn in own.items()
        }
        for name, fn in COLLECTIVES.items():
            entries[name] = Entry(
                fn,
                supports=lambda query: list(hosted),
                evidence=evidence(name),
                name=f"cuda.{name}",
                # Where sums change their form is a part of the plan, which ranks compare.
                detail=sums if name == "all_reduce" else "",
            )
        return self._with_flashinfer(entries) if self._attention == "flashinfer" else entries

    def _with_flashinfer(self, entries: Mapping[str, Entry]) -> Mapping[str, Implementations]:
        """Before the entry of paged attention the same by FlashInfer's kernels."""
        from polyaccel_cuda.flashinfer import before, require
        from polyaccel_cuda.flashinfer_attention import FlashInferOperators
        from polyaccel_cuda.flashinfer_plan import Planner

        package = require()
        if self._planner is None:
            self._planner = Planner(package, self.launcher)
        operators, own = FlashInferOperators(self.launcher, self._planner), entries["paged_attention"]
        kernels = before(own, operators.paged_attention, package.version, self._planner.announce)
        return {**entries, "paged_attention": (kernels, own)}

    def _keep_kernels(self) -> None:
        """Before the first kernel is compiled. In the interpreter there are none."""
        if self.kernels is None and torch.cuda.is_available():
            from polyaccel_cuda import kernel_cache

            names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
            self.kernels = kernel_cache.install(self.name, names)

    # -- memory ------------------------------------------------------------------------------------------------------

    def allocate_weight(self, spec: WeightSpec, device: Device, tied: Weight | None = None) -> Weight:
        if self.batch_invariant and spec.experts is not None:
            raise ConfigurationError(f"batch_invariant: the products of {spec.site}'s experts depend on the batch here")
        weight = allocate(spec, device, tied)
        if device.torch_device.type == "cuda":
            self._warm_up.begin(functools.partial(self._prepare, device.torch_device))
        return weight

    def _prepare(self, device: torch.device) -> None:
        self._keep_kernels()
        prepare(device)

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
        return CapturedSamplingState(spec, device)

    # -- stepping ----------------------------------------------------------------------------------------------------

    def begin_step(self, inputs: StepInput, state: DeviceState, device: Device) -> Step:
        from polyaccel_cuda.step import StepLoader

        loader = self._loaders.get(device.index)
        if loader is None:
            loader = self._loaders[device.index] = StepLoader(
                device, self.launcher, batch_invariant=self.batch_invariant
            )
        step = loader.begin(inputs, state)
        if self._planner is not None:
            self._planner.begin(step, device, captured=any(graph.holds_memory for graph in self._graphs))
        return step

    def graph_refusals(self) -> list[Reason]:
        hosted = [group.hosted for group in self._groups if group.hosted]
        return [f"ranks talk through host memory, which no graph holds: {reason}" for reason in hosted]

    def capture(self, key: GraphKey, fn: StepFunction, step: Step) -> Graph:
        from polyaccel_cuda.graph import CudaGraph
        from polyaccel_cuda.step import CudaStep

        own = CudaStep.of("capture", step)
        if not any(graph.holds_memory for graph in self._graphs):
            # A pool ends with its last graph; torch refuses a capture into one that has ended (vLLM issue 28426).
            self._pool = torch.cuda.graph_pool_handle()
        graph = CudaGraph(
            key, fn, self.ledger, self._pool, self._replayed if self._groups else None, self._check_groups
        )
        graph.capture(own)
        self._graphs.add(graph)
        return graph

    def connect(self, address: RankAddress) -> Communicator:
        """One GPU a rank. The first group that this instance joins says which: later ones number their ranks anew."""
        given_up = [group for group in self._groups if group.abandoned and group.world_size == address.world_size]
        self._groups = [group for group in self._groups if not group.closed]
        if address.world_size == 1:
            return super().connect(address)
        if self.batch_invariant and address.world_size > 2:
            raise ConfigurationError(
                f"batch_invariant: in which order {address.world_size} ranks are summed depends on the size; at most 2"
            )
        from polyaccel_cuda.communicator import CudaCommunicator

        self._keep_kernels()
        if self._own_device is None:
            count = torch.cuda.device_count()
            self._own_device = torch.device("cuda", min(address.rank, count - 1)) if count else torch.device("cpu")
        if given_up and torch.cuda.is_available():
            # A group is given up for want of memory, and libraries have allocators of their own.
            torch.cuda.empty_cache()
        like = given_up[-1] if given_up else None
        group = CudaCommunicator(address, self.launcher, self._own_device, like)
        self._groups.append(group)
        return group

    def _check_groups(self) -> None:
        for group in self._groups:
            group.check()

    def _replayed(self) -> None:
        for group in self._groups:
            group.issued()

    def close(self) -> None:
        kernels, self.kernels = self.kernels, None
        if kernels is not None:
            logger.info("%s", kernels.report())
            kernels.folder.close()
        super().close()


def _is_current(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.current_device() == device.index
