"""Wrong graphs and adapter loads, planted in the simulated backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from polyaccel.backend import (
    AdapterStore,
    Backend,
    Device,
    Event,
    Graph,
    GraphKey,
    PackedAdapter,
    SampleOutput,
    SlotRange,
    Step,
    StepFunction,
    Weight,
)
from polyaccel_conformance.mutants.devices import simulated, wrapped
from polyaccel_conformance.mutants.mutant import Function, Mutant
from polyaccel_conformance.simulated import SimulatedBackend
from polyaccel_conformance.simulated.graph import SimulatedGraph
from polyaccel_conformance.simulated.launch import launch
from polyaccel_conformance.simulated.step import RunningStep, SimulatedStep, StepBuffers
from polyaccel_conformance.simulated.storage import SimulatedAdapterStore

REPLAYED = ("linear", "sgmv")
"""Their cases ask about captured steps, and about what adapters cost in them."""


class _Baked(SimulatedStep):
    """Its kernels see the metadata of the capture for ever."""

    device: Any

    def running(self) -> RunningStep:
        buffers = StepBuffers(self.buffers.room, self.device)
        buffers.load(self.input, self.state)
        return RunningStep(buffers, self.extent, self.state)


class _SizedAtCapture(SimulatedStep):
    """Its kernels work on as many adapter rows as the captured step had."""

    def running(self) -> RunningStep:
        found = super().running()
        for row_set, triples in found.input.adapters.items():
            most = len(self.input.rows(row_set))
            found.input.adapters[row_set] = type(triples).build(
                triples.rows[:most], triples.slots[:most], triples.weights[:most]
            )
        return found


def _capturing(kind: type[Any]) -> Callable[[SimulatedBackend], Backend]:
    """Captures with a step of another class."""

    def apply(inner: SimulatedBackend) -> Backend:
        def capture(key: GraphKey, fn: StepFunction, step: Step) -> Graph:
            assert isinstance(step, SimulatedStep)
            changed = kind(step.input, step.state, step.buffers)
            changed.device = inner._devices[0]
            return SimulatedBackend.capture(inner, key, fn, changed)

        inner.capture = capture  # type: ignore[method-assign]
        return inner

    return apply


class Replaying(Graph):
    """Around a graph."""

    def __init__(self, backend: SimulatedBackend, key: GraphKey, fn: StepFunction, step: Step) -> None:
        self.key, self.backend, self.fn = key, backend, fn
        self.graph = SimulatedBackend.capture(backend, key, fn, step)
        self.replays = 0

    def replay(self, step: Step) -> SampleOutput:
        self.replays += 1
        return self.graph.replay(step)

    def close(self) -> None:
        self.graph.close()


class _FrozenLedger(Replaying):
    """Replays launch, and nobody counts."""

    def replay(self, step: Step) -> SampleOutput:
        assert isinstance(self.graph, SimulatedGraph)
        self.graph._launches = {}
        return super().replay(step)


class _ThirdReplay(Replaying):
    """The third replay of a graph runs its first step again."""

    first: Step | None = None

    def replay(self, step: Step) -> SampleOutput:
        if self.replays == 2 and self.first is not None:
            device = self.backend._devices[0]
            self.backend.begin_step(self.first.input, step.state, device)
        self.first = self.first or step
        return super().replay(step)


class _Recapturing(Replaying):
    """Notices another adapter, and captures again to be safe."""

    loads = -1

    def replay(self, step: Step) -> SampleOutput:
        store = step.state.adapters
        loads = store.loads if isinstance(store, _CountingStore) else 0
        if self.loads not in (-1, loads):
            self.graph = SimulatedBackend.capture(self.backend, self.key, self.fn, step)
        self.loads = loads
        return super().replay(step)


class _CountingStore(SimulatedAdapterStore):
    """Knows how often it was written to."""

    loads = 0

    def write(self, where: SlotRange, packed: PackedAdapter) -> Event:
        self.loads += 1
        return super().write(where, packed)


class _ModuleByModule(SimulatedAdapterStore):
    """Every module's matrices are copied to the device by themselves."""

    def write(self, where: SlotRange, packed: PackedAdapter) -> Event:
        event = super().write(where, packed)
        for entry in packed.entries:
            self._virtual.upload(packed.a(entry))
            self._virtual.upload(packed.b(entry))
        return event


def _graphs(kind: type[Replaying], store: type[SimulatedAdapterStore] = SimulatedAdapterStore) -> Any:
    def apply(inner: SimulatedBackend) -> Backend:
        inner.capture = lambda key, fn, step: kind(inner, key, fn, step)  # type: ignore[method-assign]
        return _stored(store)(inner)

    return apply


def _stored(kind: type[SimulatedAdapterStore]) -> Callable[[SimulatedBackend], Backend]:
    def apply(inner: SimulatedBackend) -> Backend:
        def allocate(weights: Mapping[str, Weight], *, rank_rows: int, slots: int, device: Device) -> AdapterStore:
            return kind(weights, rank_rows=rank_rows, slots=slots, device=inner._own(device), launcher=inner.launcher)

        inner.allocate_adapters = allocate  # type: ignore[method-assign]
        return inner

    return apply


def _extra(when: Callable[[SimulatedStep], bool]) -> Callable[[SimulatedBackend], Backend]:
    """One launch more in every embedding of some steps."""

    def wrap(fn: Function, backend: SimulatedBackend) -> Function:
        def embedding(weight: Any, step: SimulatedStep, vocabulary_start: int) -> torch.Tensor:
            if when(step):
                launch(backend.launcher, "simulated.embedding", {"weight": weight.tensor}, lambda: None)
            y: torch.Tensor = fn(weight, step, vocabulary_start)
            return y

        return embedding

    return wrapped("embedding", wrap)


GRAPHS: tuple[Mutant, ...] = (
    simulated(
        "graph.metadata_of_capture",
        "A replay reads the metadata of the capture.",
        "graph.replay",
        _capturing(_Baked),
        REPLAYED,
    ),
    simulated(
        "graph.grid_of_capture",
        "A replay covers as many adapter rows as the capture had.",
        "graph.replay",
        _capturing(_SizedAtCapture),
        REPLAYED,
    ),
    simulated(
        "graph.third_replay", "The third replay runs the first step.", "graph.replay", _graphs(_ThirdReplay), REPLAYED
    ),
    simulated("graph.ledger_frozen", "Replays are not counted.", "graph.replay", _graphs(_FrozenLedger), REPLAYED),
    simulated(
        "graph.captures_after_load",
        "Every load captures again.",
        "graph.adapter_cost",
        _graphs(_Recapturing, _CountingStore),
        REPLAYED,
    ),
    simulated(
        "graph.base_rows_work",
        "Steps without adapters launch more once there is a store.",
        "graph.adapter_cost",
        _extra(lambda step: step.state.adapters is not None),
        (*REPLAYED, "embedding"),
    ),
    simulated(
        "graph.undeclared_launch",
        "Adapters launch one kernel more than declared.",
        "graph.adapter_cost",
        _extra(lambda step: step.input.has_adapters),
        (*REPLAYED, "embedding"),
    ),
    simulated(
        "adapters.module_by_module",
        "A load copies every module by itself.",
        "lora.load_cost",
        _stored(_ModuleByModule),
        (*REPLAYED, "storage.adapters"),
    ),
)
