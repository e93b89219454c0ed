"""The backend object: everything together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from polyaccel.backend import (
    AdapterStore,
    Availability,
    Backend,
    Collective,
    Communicator,
    Device,
    DeviceState,
    Entry,
    Graph,
    GraphKey,
    KVCache,
    KVSpec,
    OperatorError,
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

from .adapter_store import FoldedAdapterStore
from .communicator import FoldedCommunicator
from .device import FoldedDevice
from .evidence import EVIDENCE
from .graph import FoldedGraph
from .kv_cache import BLOCK_SIZE, FoldedKVCache
from .operators import FoldedOperators
from .sampling_state import FoldedSamplingState
from .stations import FoldedStations
from .step import FoldedStep, StepLoader
from .weight import FoldedWeight
from .work_queue import Queue


class FoldedBackend(Backend):
    """A GPU's manners on the CPU. Never chosen by ``auto``."""

    name = "folded"
    priority = None
    isolate = False
    fork_safe = True

    def __init__(self) -> None:
        super().__init__()
        self.queue = Queue()
        self.device = FoldedDevice(self.queue)
        self._loader = StepLoader(self.device)
        self._communicator: Communicator | None = None

    def probe(self) -> Availability:
        return Availability(usable=True, devices=(self.device.name,))

    def devices(self) -> Sequence[Device]:
        return (self.device,)

    def operators(self) -> Mapping[str, Implementations]:
        one, station = FoldedOperators(self.device, self.launcher), FoldedStations(self.device, self.launcher)
        details = {"row_parallel_linear": "ride", "row_parallel_add_norm": "ride"}
        functions: Mapping[str, Callable[..., object]] = {
            "embedding": one.embedding,
            "linear": one.linear,
            "rms_norm": one.rms_norm,
            "rotary_embedding": one.rotary_embedding,
            "silu_and_mul": one.silu_and_mul,
            "select_rows": one.select_rows,
            "write_kv_cache": one.write_kv_cache,
            "paged_attention": one.paged_attention,
            "sgmv": one.sgmv,
            "moe_route": one.moe_route,
            "moe_experts": one.moe_experts,
            "dequantize": one.dequantize,
            "sample": one.sample,
            "all_reduce": one.all_reduce,
            "all_gather": one.all_gather,
            "column_linear": station.column_linear,
            "qkv_rope_cache": station.qkv_rope_cache,
            "gate_up_act": station.gate_up_act,
            "row_parallel_linear": station.row_parallel_linear,
            "row_parallel_add_norm": station.row_parallel_add_norm,
        }
        return {
            name: Entry(fn, name=f"folded.{name}", evidence=EVIDENCE[name], detail=details.get(name, ""))
            for name, fn in functions.items()
        }

    def composites(self) -> Mapping[str, Callable[..., object]]:
        """Composites compute at once, so what they read is computed first; a graph cannot hold them."""

        def synchronising(fn: Callable[..., object]) -> Callable[..., object]:
            def composite(*args: object, **kwargs: object) -> object:
                self.queue.flush()
                return fn(*args, **kwargs)

            return composite

        return {name: synchronising(fn) for name, fn in super().composites().items()}

    # -- storage -------------------------------------------------------------------------------------------------------

    def allocate_weight(self, spec: WeightSpec, device: Device, tied: Weight | None = None) -> Weight:
        return FoldedWeight(spec, self.device, tied)

    def allocate_adapters(
        self, weights: Mapping[str, Weight], *, rank_rows: int, slots: int, device: Device
    ) -> AdapterStore:
        return FoldedAdapterStore(weights, rank_rows=rank_rows, slots=slots, device=self.device)

    def kv_block_size(self) -> int:
        return BLOCK_SIZE

    def allocate_kv(self, spec: KVSpec, device: Device) -> KVCache:
        return FoldedKVCache(spec, self.device)

    def allocate_sampling(self, spec: SamplingSpec, device: Device) -> SamplingState:
        return FoldedSamplingState(spec, self.device)

    # -- stepping ------------------------------------------------------------------------------------------------------

    def begin_step(self, inputs: StepInput, state: DeviceState, device: Device) -> Step:
        return self._loader.begin(inputs, state)

    def graph_refusals(self) -> list[Reason]:
        return []

    def capture(self, key: GraphKey, fn: StepFunction, step: Step) -> Graph:
        store = step.state.adapters
        if not isinstance(step, FoldedStep) or step.state.sampling is None:
            raise UnsupportedError("a graph is captured for the fixed buffers of a decode step")
        if step.extent.tokens != key.rows or step.rank_rows > key.rank_rows:
            raise OperatorError(
                "capture", f"a step of {step.extent.tokens} rows and {step.rank_rows} rank rows for {key}"
            )
        step.rank_rows = min(key.rank_rows, 0 if store is None else store.rank_rows)
        trace = None if self._communicator is None else self._communicator.trace
        traced = 0 if trace is None else len(trace)
        with self.ledger.capture() as launches, self.queue.record() as calls:
            output = fn(step)
        collectives: list[Collective] = []
        if trace is not None:
            collectives = trace[traced:]
            del trace[traced:]
        graph = FoldedGraph(key, step, output, calls=calls, launches=launches, collectives=collectives)
        graph.attach(self.queue, self.ledger, self._communicator)
        return graph

    # -- ranks ---------------------------------------------------------------------------------------------------------

    def connect(self, address: RankAddress) -> Communicator:
        return self.adopt(super().connect(address))

    def adopt(self, communicator: Communicator) -> Communicator:
        """The communicator in the order of this backend's queue; a single rank needs no order."""
        if communicator.world_size > 1:
            communicator = FoldedCommunicator(communicator, self.device)
        self._communicator = communicator
        return communicator

    def close(self) -> None:
        self.queue.clear()
