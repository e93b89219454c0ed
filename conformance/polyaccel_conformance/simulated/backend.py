"""The backend object: everything together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import torch

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
    Launcher,
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
)
from polyaccel.backend.backend import Implementations
from polyaccel_conformance.simulated.communicator import SimulatedCommunicator
from polyaccel_conformance.simulated.device import SimulatedDevice
from polyaccel_conformance.simulated.factories import device_of
from polyaccel_conformance.simulated.graph import SimulatedGraph
from polyaccel_conformance.simulated.operators import SimulatedOperators
from polyaccel_conformance.simulated.runtime import Runtime
from polyaccel_conformance.simulated.step import SimulatedStep, StepLoader
from polyaccel_conformance.simulated.storage import SimulatedAdapterStore, SimulatedKVCache, SimulatedSamplingState


class SimulatedBackend(Backend):
    """Several virtual devices in one process, over plain torch on the CPU. Never chosen by ``auto``.

    Args:
        runtime: the machine; a new one of two devices by default.
    """

    name = "simulated"
    priority = None
    isolate = False
    fork_safe = True
    simulated = True

    def __init__(self, runtime: Runtime | None = None) -> None:
        super().__init__()
        self.runtime = runtime if runtime is not None else Runtime()
        self.launcher = Launcher(self.ledger, enter=self._enter, is_current=self._is_current, rank=0)
        self._devices = [SimulatedDevice(virtual) for virtual in self.runtime.devices]
        self._loaders = [StepLoader(device) for device in self._devices]
        self._communicator: Communicator | None = None

    def probe(self) -> Availability:
        return Availability(usable=True, devices=tuple(device.name for device in self._devices))

    def devices(self) -> Sequence[Device]:
        return self._devices

    def operators(self) -> Mapping[str, Implementations]:
        return {
            name: Entry(fn, evidence=(f"simulated.{name}",))
            for name, fn in SimulatedOperators(self.launcher).table().items()
        }

    # -- storage -------------------------------------------------------------------------------------------------------

    def allocate_adapters(
        self, weights: Mapping[str, Weight], *, rank_rows: int, slots: int, device: Device
    ) -> AdapterStore:
        return SimulatedAdapterStore(
            weights, rank_rows=rank_rows, slots=slots, device=self._own(device), launcher=self.launcher
        )

    def allocate_kv(self, spec: KVSpec, device: Device) -> KVCache:
        return SimulatedKVCache(spec, self._own(device), self.launcher)

    def allocate_sampling(self, spec: SamplingSpec, device: Device) -> SamplingState:
        return SimulatedSamplingState(spec, self._own(device), self.launcher)

    # -- stepping ------------------------------------------------------------------------------------------------------

    def begin_step(self, inputs: StepInput, state: DeviceState, device: Device) -> Step:
        return self._loaders[self._own(device).index].begin(inputs, state)

    def graph_refusals(self) -> list[Reason]:
        return []

    def capture(self, key: GraphKey, fn: StepFunction, step: Step) -> Graph:
        if not isinstance(step, SimulatedStep) or step.state.sampling is None:
            raise UnsupportedError("a graph is captured for the fixed buffers of a decode step")
        if step.extent.tokens != key.rows or step.has_more_rank_rows(key.rank_rows):
            raise OperatorError("capture", f"a step of {step.extent} for {key}")
        device = self._devices[step.buffers.anchor.memory.device.index]
        trace = None if self._communicator is None else self._communicator.trace
        traced = 0 if trace is None else len(trace)
        stream = self.runtime.current_stream(device.virtual)
        with self.ledger.capture() as launches, device.scope(), self.runtime.capture(stream) as tasks:
            output = fn(step)
        collectives: list[Collective] = []
        if trace is not None:
            collectives = trace[traced:]
            del trace[traced:]
        return SimulatedGraph(
            key,
            step,
            output,
            device=device,
            ledger=self.ledger,
            communicator=self._communicator,
            tasks=tasks,
            launches=launches,
            collectives=collectives,
        )

    # -- ranks ---------------------------------------------------------------------------------------------------------

    def connect(self, address: RankAddress) -> Communicator:
        return self.adopt(super().connect(address))

    def adopt(self, communicator: Communicator) -> Communicator:
        """The communicator in the order of this machine's streams; a single rank needs no order."""
        self.launcher.rank = communicator.rank
        if communicator.world_size > 1:
            communicator = SimulatedCommunicator(communicator, self.runtime, self.launcher)
        self._communicator = communicator
        return communicator

    # -- the guard -----------------------------------------------------------------------------------------------------

    def _enter(self, device: torch.device) -> AbstractContextManager[object]:
        return self.runtime.use_device(device_of(device))

    def _is_current(self, device: torch.device) -> bool:
        return self.runtime.current_device.number == device.index

    def _own(self, device: Device) -> SimulatedDevice:
        if not isinstance(device, SimulatedDevice) or device.runtime is not self.runtime:
            raise OperatorError("devices", f"{device.name} is not a device of this machine")
        return device
