"""The harness's instruments on the simulated machine: it has everything."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch

from polyaccel.backend import Device
from polyaccel_conformance.harness.devices import Activity, Capability, Instruments, Recording, SideStream
from polyaccel_conformance.simulated.device import SimulatedDevice
from polyaccel_conformance.simulated.runtime import Runtime, VirtualDevice
from polyaccel_conformance.simulated.stream import Stream
from polyaccel_conformance.simulated.tensor import VirtualTensor


@dataclass(frozen=True, slots=True)
class SimulatedSideStream(SideStream):
    """A second stream of a virtual device. A unit of delay is a kernel's duration."""

    runtime: Runtime
    stream: Stream

    def use(self) -> AbstractContextManager[object]:
        return self.runtime.use_stream(self.stream)

    def delay(self, amount: float) -> None:
        self.runtime.delay(self.stream, amount)

    def synchronize(self) -> None:
        self.runtime.wait_stream(self.stream)


class SimulatedInstruments(Instruments):
    """Read straight from the runtime."""

    def __init__(self, device: SimulatedDevice, devices: Sequence[Device]) -> None:
        super().__init__(device, devices)
        self._runtime, self._virtual = device.runtime, device.virtual
        self._side: SimulatedSideStream | None = None

    def lacks(self, capability: Capability) -> str:
        if capability == "devices" and self.other is self.device:
            return f"the machine has one device, {self.device.name}"
        return ""

    def current(self) -> int:
        return self._runtime.current_device.index

    def use(self, device: Device) -> AbstractContextManager[object]:
        return self._runtime.use_device(_virtual(device))

    def stream(self) -> SideStream:
        if self._side is None:
            self._side = SimulatedSideStream(self._runtime, self._runtime.new_stream(self._virtual))
        return self._side

    def peek(self, tensor: torch.Tensor) -> torch.Tensor:
        assert isinstance(tensor, VirtualTensor)
        return tensor.host.clone()

    def allocated(self, device: Device) -> int:
        return _virtual(device).allocated

    def ever_allocated(self, device: Device) -> int:
        return _virtual(device).ever

    @contextmanager
    def exhausted(self, device: Device) -> Iterator[None]:
        virtual = _virtual(device)
        before, virtual.capacity = virtual.capacity, 0
        try:
            yield
        finally:
            virtual.capacity = before

    @contextmanager
    def recording(self) -> Iterator[Recording]:
        found = Recording()
        self._runtime.wait_device(self._virtual)
        trace: list[tuple[str, str]] = []
        self._virtual.trace = trace
        try:
            yield found
            self._runtime.wait_device(self._virtual)
        finally:
            self._virtual.trace = None
        found.activities = tuple(Activity(name=n, kind=kind) for n, kind in trace if kind not in ("mark", "delay"))

    def arm_failure(self) -> None:
        self._runtime.arm_failure()


def _virtual(device: Device) -> VirtualDevice:
    assert isinstance(device, SimulatedDevice)
    return device.virtual
