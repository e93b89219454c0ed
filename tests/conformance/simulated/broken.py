"""Simulated backends with one planted bug each, as somebody might write it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from polyaccel.backend import (
    AdapterStore,
    Device,
    DeviceState,
    Event,
    Graph,
    GraphKey,
    Launcher,
    PackedAdapter,
    PolyaccelError,
    SampleOutput,
    SlotRange,
    Step,
    StepFunction,
    StepInput,
    Weight,
)
from polyaccel.backend.backend import Implementations
from polyaccel_conformance.simulated import Runtime, SimulatedBackend, SimulatedDevice
from polyaccel_conformance.simulated.factories import device_of
from polyaccel_conformance.simulated.launch import launch
from polyaccel_conformance.simulated.step import RunningStep, SimulatedStep, StepBuffers
from polyaccel_conformance.simulated.storage import SimulatedAdapterStore
from polyaccel_conformance.simulated.stream import Stream, Task

FILE = __file__


def healthy() -> SimulatedBackend:
    return SimulatedBackend()


# -- devices -----------------------------------------------------------------------------------------------------------


def no_guard() -> SimulatedBackend:
    """Kernels go to whatever device is current."""
    backend = SimulatedBackend()
    backend.launcher = Launcher(backend.ledger, rank=0)
    return backend


def not_restored() -> SimulatedBackend:
    """The current device is restored, but not when the kernel raises."""
    backend = SimulatedBackend()
    runtime = backend.runtime

    @contextmanager
    def enter(device: torch.device) -> Iterator[None]:
        before = runtime.current_device.index
        runtime.set_device(device_of(device).index)
        yield
        runtime.set_device(before)

    def is_current(device: torch.device) -> bool:
        return runtime.current_device.number == device.index

    backend.launcher = Launcher(backend.ledger, enter=enter, is_current=is_current, rank=0)
    return backend


class _Wrapped(SimulatedBackend):
    """One operator replaced by something around it."""

    def __init__(self, operator: str, wrap: Callable[[Any, _Wrapped], Callable[..., object]]) -> None:
        super().__init__()
        self._operator, self._wrap = operator, wrap

    def operators(self) -> Mapping[str, Implementations]:
        table: dict[str, Any] = dict(super().operators())
        entry = table[self._operator]
        table[self._operator] = replace(entry, fn=self._wrap(entry.fn, self))
        return table


def scratch_on_the_first_device() -> SimulatedBackend:
    """A workspace that is always taken from device 0."""

    def wrap(fn: Any, backend: _Wrapped) -> Callable[..., object]:
        def linear(x: torch.Tensor, weight: Weight) -> object:
            backend.devices()[0].empty((max(x.numel(), 1),), torch.float32)
            return fn(x, weight)

        return linear

    return _Wrapped("linear", wrap)


def takes_any_device() -> SimulatedBackend:
    """Operands of other devices are fetched silently."""

    def wrap(fn: Any, backend: _Wrapped) -> Callable[..., object]:
        def linear(x: torch.Tensor, weight: Any) -> object:
            return fn(x.to(weight.tensor.device), weight)

        return linear

    return _Wrapped("linear", wrap)


def leaks() -> SimulatedBackend:
    """Every call keeps its workspace."""
    kept: list[torch.Tensor] = []

    def wrap(fn: Any, backend: _Wrapped) -> Callable[..., object]:
        def linear(x: torch.Tensor, weight: Weight) -> object:
            kept.append(x.new_empty(64))
            return fn(x, weight)

        return linear

    return _Wrapped("linear", wrap)


# -- streams -----------------------------------------------------------------------------------------------------------


class _DefaultStream(Runtime):
    """Kernels are launched into the default stream, whichever is current."""

    def submit(self, task: Task, stream: Stream | None = None) -> None:
        super().submit(task, self.current_device.streams[0] if stream is None else stream)


def default_stream() -> SimulatedBackend:
    return SimulatedBackend(_DefaultStream())


class _EarlyStep(SimulatedBackend):
    """Metadata is written by a stream of its own, for which nobody waits."""

    def __init__(self) -> None:
        super().__init__()
        self._copies = self.runtime.new_stream(self.runtime.devices[0])

    def begin_step(self, inputs: StepInput, state: DeviceState, device: Device) -> Step:
        self.runtime.delay(self._copies, 1000.0)
        with self.runtime.use_stream(self._copies):
            return super().begin_step(inputs, state, device)


def step_on_another_stream() -> SimulatedBackend:
    return _EarlyStep()


# -- errors ------------------------------------------------------------------------------------------------------------


class _DeafDevice(SimulatedDevice):
    """Waiting for the device ignores what it reports."""

    def synchronize(self) -> None:
        try:
            super().synchronize()
        except PolyaccelError:
            self.virtual.failure = None


def swallows() -> SimulatedBackend:
    backend = SimulatedBackend()
    backend._devices = [_DeafDevice(virtual) for virtual in backend.runtime.devices]
    return backend


class _Nameless(Runtime):
    """Nothing is kept about what was launched."""

    def submit(self, task: Task, stream: Stream | None = None) -> None:
        super().submit(replace(task, operands=()), stream)


def names_no_operands() -> SimulatedBackend:
    return SimulatedBackend(_Nameless())


class _Forgets(Runtime):
    """Once a failure has been reported the device is used again."""

    def refuse_if_lost(self, device: Any) -> None:
        if device.surfaced:
            device.failure, device.surfaced = None, False


def goes_on_after_a_failure() -> SimulatedBackend:
    return SimulatedBackend(_Forgets())


# -- graphs ------------------------------------------------------------------------------------------------------------


class _Baked(SimulatedStep):
    """Its kernels see the metadata of the capture for ever."""

    def running(self) -> RunningStep:
        buffers = StepBuffers(self.buffers.room, self.device)
        buffers.load(self.input, self.state)
        return RunningStep(buffers, self.extent, self.state)

    device: SimulatedDevice


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


class _Graphs(SimulatedBackend):
    """Captures with a step of a class of its own."""

    def __init__(self, step: type[SimulatedStep]) -> None:
        super().__init__()
        self._step = step

    def capture(self, key: GraphKey, fn: StepFunction, step: Step) -> Graph:
        assert isinstance(step, SimulatedStep)
        changed = self._step(step.input, step.state, step.buffers)
        changed.device = self._devices[0]  # type: ignore[attr-defined]
        return super().capture(key, fn, changed)


def metadata_baked_in() -> SimulatedBackend:
    return _Graphs(_Baked)


def grid_sized_at_capture() -> SimulatedBackend:
    return _Graphs(_SizedAtCapture)


class _Recapturing(Graph):
    """Notices another adapter, and captures again to be safe."""

    def __init__(self, backend: SimulatedBackend, key: GraphKey, fn: StepFunction, step: Step) -> None:
        self.key, self._backend, self._fn = key, backend, fn
        self._graph = SimulatedBackend.capture(backend, key, fn, step)
        self._loads = _loads(step)

    def replay(self, step: Step) -> SampleOutput:
        if _loads(step) != self._loads:
            self._loads = _loads(step)
            self._graph = SimulatedBackend.capture(self._backend, self.key, self._fn, step)
        return self._graph.replay(step)

    def close(self) -> None:
        self._graph.close()


class _CountingStore(SimulatedAdapterStore):
    """Knows how often it was written to."""

    loads = 0

    def write(self, where: SlotRange, packed: PackedAdapter) -> Event:
        self.loads += 1
        return super().write(where, packed)


def _loads(step: Step) -> int:
    store = step.state.adapters
    return store.loads if isinstance(store, _CountingStore) else 0


class _RecapturingBackend(SimulatedBackend):
    def allocate_adapters(
        self, weights: Mapping[str, Weight], *, rank_rows: int, slots: int, device: Device
    ) -> AdapterStore:
        return _CountingStore(
            weights, rank_rows=rank_rows, slots=slots, device=self._own(device), launcher=self.launcher
        )

    def capture(self, key: GraphKey, fn: StepFunction, step: Step) -> Graph:
        return _Recapturing(self, key, fn, step)


def captures_after_each_load() -> SimulatedBackend:
    return _RecapturingBackend()


def _extra_launch(fn: Any, backend: _Wrapped, when: Callable[[SimulatedStep], bool]) -> Callable[..., object]:
    def embedding(weight: Any, step: SimulatedStep, vocabulary_start: int) -> object:
        if when(step):
            launch(backend.launcher, "simulated.extra", {"weight": weight.tensor}, lambda: None)
        return fn(weight, step, vocabulary_start)

    return embedding


def base_rows_work_for_adapters() -> SimulatedBackend:
    """One launch more as soon as there is a store, whether the step names an adapter or not."""
    return _Wrapped("embedding", lambda fn, b: _extra_launch(fn, b, lambda step: step.state.adapters is not None))


def undeclared_launch() -> SimulatedBackend:
    """One launch more than declared where the step names adapters."""
    return _Wrapped("embedding", lambda fn, b: _extra_launch(fn, b, lambda step: step.input.has_adapters))


# -- adapters ----------------------------------------------------------------------------------------------------------


class _ModuleByModule(SimulatedAdapterStore):
    """Every module's matrices are copied to the device by themselves."""

    def write(self, where: SlotRange, packed: PackedAdapter) -> Event:
        for entry in packed.entries:
            self._virtual.upload(packed.a(entry))
            self._virtual.upload(packed.b(entry))
        return super().write(where, packed)


class _SlowLoads(SimulatedBackend):
    def allocate_adapters(
        self, weights: Mapping[str, Weight], *, rank_rows: int, slots: int, device: Device
    ) -> AdapterStore:
        return _ModuleByModule(
            weights, rank_rows=rank_rows, slots=slots, device=self._own(device), launcher=self.launcher
        )


def one_copy_a_module() -> SimulatedBackend:
    return _SlowLoads()
