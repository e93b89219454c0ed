"""Wrong guards, streams, errors, memory and evidence, planted in the simulated multi-device backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from polyaccel.backend import (
    Backend,
    Device,
    DeviceState,
    Event,
    Launcher,
    PolyaccelError,
    Step,
    StepInput,
    plan,
)
from polyaccel_conformance.mutants.mutant import Altered, Function, Mutant, undisguised
from polyaccel_conformance.simulated import Runtime, SimulatedBackend, SimulatedDevice
from polyaccel_conformance.simulated.device import SimulatedEvent
from polyaccel_conformance.simulated.factories import device_of
from polyaccel_conformance.simulated.stream import Stream, Task
from polyaccel_conformance.simulated.tensor import empty_on

Tensor = torch.Tensor
SOME = ("silu_and_mul", "select_rows")
"""Operators whose cases are run where all of them are wrong alike."""


def simulated(
    name: str,
    what: str,
    check: str,
    apply: Callable[[Any], Backend],
    operators: tuple[str, ...] = SOME,
    *,
    narrow: bool = False,
) -> Mutant:
    """A mutant of the simulated backend. ``apply`` gets a :class:`SimulatedBackend`."""
    return Mutant(name=name, what=what, operators=operators, check=check, apply=apply, host="simulated", narrow=narrow)


def wrapped(operator: str, wrap: Callable[[Function, SimulatedBackend], Function]) -> Callable[[Any], Backend]:
    """``apply`` that puts something around one operator, whose evidence stays declared as it is."""
    return lambda inner: undisguised(inner, operator, lambda fn: wrap(fn, inner))


# -- the guard ---------------------------------------------------------------------------------------------------------


def _no_guard(inner: SimulatedBackend) -> Backend:
    class Unguarded(SimulatedBackend):
        """Kernels go to whatever device is current."""

        def __init__(self) -> None:
            super().__init__()
            self.launcher = Launcher(self.ledger, rank=0)

    return Unguarded()


def _not_restored(inner: SimulatedBackend) -> Backend:
    runtime = inner.runtime

    @contextmanager
    def enter(device: torch.device) -> Iterator[None]:
        before = runtime.current_device.index
        runtime.set_device(device_of(device).index)
        yield
        runtime.set_device(before)

    def is_current(device: torch.device) -> bool:
        return runtime.current_device.number == device.index

    inner.launcher = Launcher(inner.ledger, enter=enter, is_current=is_current, rank=0)
    return inner


def first_device_scratch(fn: Function, backend: SimulatedBackend) -> Function:
    """A workspace that is always taken from device 0."""

    def operator(x: Tensor, *rest: Any) -> Any:
        backend.devices()[0].empty((max(x.numel(), 1),), torch.float32)
        return fn(x, *rest)

    return operator


def _fetches(fn: Function, backend: SimulatedBackend) -> Function:
    def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        y: Tensor = fn(x, weight if weight.device == x.device else weight.to(x.device), bias, eps)
        return y

    return layer_norm


def _lets_in(inner: Any) -> Backend:
    # The process is this mutant's own.
    vars(plan)["check_devices"] = lambda *operands: None
    return wrapped("layer_norm", _fetches)(inner)


def leaks(fn: Function, backend: SimulatedBackend) -> Function:
    """Every call keeps its workspace."""
    kept: list[Tensor] = []

    def operator(x: Any, *rest: Any) -> Any:
        kept.append(backend.devices()[x.memory.device.index].empty((64,), torch.float32))
        return fn(x, *rest)

    return operator


# -- streams -----------------------------------------------------------------------------------------------------------


class _DefaultStream(Runtime):
    """Kernels are launched into the default stream, whichever is current."""

    def submit(self, task: Task, stream: Stream | None = None) -> None:
        super().submit(task, self.current_device.streams[0] if stream is None else stream)


class _OwnStreamForSteps(SimulatedBackend):
    """Metadata goes through a stream of its own, for which only the default stream waits."""

    def __init__(self) -> None:
        super().__init__()
        self._copies = [self.runtime.new_stream(device) for device in self.runtime.devices]

    def begin_step(self, inputs: StepInput, state: DeviceState, device: Device) -> Step:
        runtime, copies = self.runtime, self._copies[device.index]
        with runtime.use_stream(copies):
            runtime.delay(copies, 1000.0)
            step = super().begin_step(inputs, state, device)
        runtime.stream_wait(runtime.devices[device.index].streams[0], runtime.mark(copies))
        return step


# -- errors ------------------------------------------------------------------------------------------------------------


class _DeafDevice(SimulatedDevice):
    """Waiting for the device ignores what it reports."""

    def synchronize(self) -> None:
        try:
            super().synchronize()
        except PolyaccelError:
            self.virtual.failure = None


class _DeafEvent(SimulatedEvent):
    def synchronize(self) -> None:
        try:
            super().synchronize()
        except PolyaccelError:
            return


class _DeafToEvents(SimulatedDevice):
    """Waiting for an event ignores what it reports."""

    def record(self) -> Event:
        return _DeafEvent(self.runtime, self._mark())


def _devices(kind: type[SimulatedDevice]) -> Callable[[SimulatedBackend], Backend]:
    def apply(inner: SimulatedBackend) -> Backend:
        inner._devices = [kind(virtual) for virtual in inner.runtime.devices]
        return inner

    return apply


class _Nameless(Runtime):
    """Nothing is kept about what was launched."""

    def submit(self, task: Task, stream: Stream | None = None) -> None:
        super().submit(replace(task, operands=()), stream)


class _Forgets(Runtime):
    """Once a failure has been reported the device is used again."""

    def refuse_if_lost(self, device: Any) -> None:
        if device.surfaced:
            device.failure, device.surfaced = None, False


# -- evidence ----------------------------------------------------------------------------------------------------------


def _round_trip(fn: Function) -> Function:
    def gelu(x: Tensor, approximate: str = "none") -> Tensor:
        """On the CPU, and the result is copied back."""
        y = torch.nn.functional.gelu(x.to("cpu"), approximate=approximate)
        return y.to(x.device)

    return gelu


def _on_the_host(fn: Function, backend: SimulatedBackend) -> Function:
    def silu_and_mul(x: Any) -> Tensor:
        """Through a mapping of the device's memory, which no dispatcher sees."""
        backend.runtime.wait_device(x.memory.device)
        n = x.shape[-1] // 2
        y = empty_on(x.memory.device, (*x.shape[:-1], n), x.dtype)
        # Something is dispatched, on the host.
        wide = x.host.float()
        with torch.utils._python_dispatch._disable_current_modes():
            y.host.copy_(torch.nn.functional.silu(wide[..., :n]) * wide[..., n:])
        return y

    return silu_and_mul


def _kept_by_address(fn: Function) -> Function:
    kept: dict[tuple[int, torch.Size, torch.dtype], tuple[Tensor, Tensor | None]] = {}

    def linear(x: Tensor, weight: Any) -> Tensor:
        """A weight's copy in another layout is found by the address of its bytes."""
        if weight.quantised is not None or x.dtype != weight.spec.dtype or x.shape[-1] != weight.spec.k:
            y: Tensor = fn(x, weight)
            return y
        plain = weight.tensor
        key = (plain.data_ptr(), plain.shape, plain.dtype)
        if key not in kept:
            kept[key] = plain.clone(), None if weight.bias is None else weight.bias.clone()
        copy, bias = kept[key]
        y = x.float() @ copy.float().t()
        return (y if bias is None else y + bias.float()).to(x.dtype)

    return linear


DEVICES: tuple[Mutant, ...] = (
    simulated("launch.no_guard", "Kernels go to the device that is current.", "device.wrong_current", _no_guard),
    simulated(
        "launch.not_restored", "After an exception another device is current.", "device.wrong_current", _not_restored
    ),
    simulated(
        "silu.scratch_on_first_device",
        "A workspace is always taken from device 0.",
        "device.wrong_current",
        wrapped("silu_and_mul", first_device_scratch),
        ("silu_and_mul",),
    ),
    simulated(
        "layer_norm.fetches_operands",
        "Operands of two devices are let in, and a weight elsewhere is copied silently.",
        "device.wrong_current",
        _lets_in,
        ("layer_norm",),
    ),
    simulated(
        "silu.leaks",
        "Every call keeps its workspace.",
        "memory.steady",
        wrapped("silu_and_mul", leaks),
        ("silu_and_mul",),
    ),
    simulated(
        "launch.default_stream",
        "Kernels go to the default stream.",
        "stream.side",
        lambda inner: SimulatedBackend(_DefaultStream()),
    ),
    simulated(
        "step.another_stream",
        "Metadata goes through a stream that only the default one waits for.",
        "stream.side",
        lambda inner: _OwnStreamForSteps(),
    ),
    simulated(
        "errors.names_no_operands",
        "A late failure describes no operand.",
        "errors.async_operator",
        lambda inner: SimulatedBackend(_Nameless()),
    ),
    simulated(
        "errors.goes_on",
        "A device is used after its failure.",
        "errors.async_operator",
        lambda inner: SimulatedBackend(_Forgets()),
    ),
    simulated(
        "errors.swallowed_by_device", "Waiting for a device hides failures.", "errors.swallowed", _devices(_DeafDevice)
    ),
    simulated(
        "errors.swallowed_by_event", "Waiting for an event hides failures.", "errors.swallowed", _devices(_DeafToEvents)
    ),
    simulated(
        "gelu.on_cpu_and_back",
        "The native form computes on the CPU and copies back.",
        "evidence.native",
        lambda inner: Altered(inner, {"gelu": _round_trip}),
        ("gelu",),
    ),
    simulated(
        "silu.through_mapped_memory",
        "The host computes in the device's memory.",
        "evidence.kernels",
        wrapped("silu_and_mul", _on_the_host),
        ("silu_and_mul",),
    ),
    simulated(
        "linear.kept_by_address",
        "A cache knows weights and biases by their address.",
        "storage.weight",
        lambda inner: Altered(inner, {"linear": _kept_by_address}),
        ("storage.weight", "linear"),
    ),
)
