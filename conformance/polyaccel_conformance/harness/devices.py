"""What the harness does to a device, and reads from it, behind the backend's back.

The contract knows one queue and no current device; whether a backend guards its launches, keeps to its stream, reports
failures and frees its memory can only be asked of the driver below it. What a driver cannot do is a capability that it
``lacks``, with the reason: the checks that need it are not exercised there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch

from polyaccel.backend import Device
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.errors import ConformanceError

Capability = Literal["devices", "streams", "memory", "exhaustion", "activity", "failures"]
"""Two devices and a current one; side streams and delays; counted allocation; making an allocation fail; seeing what
the device ran; making a chosen kernel fail late."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Activity:
    """One piece of work that a device did. ``kind``: ``kernel``, or a copy ``to device``, ``to host``, ``on device``,
    ``between devices``."""

    name: str
    kind: str


@dataclass(slots=True)
class Recording:
    """Activities of a block, complete when the block has ended."""

    activities: tuple[Activity, ...] = ()

    def count(self, kind: str) -> int:
        return sum(1 for activity in self.activities if activity.kind == kind)


class SideStream(ABC):
    """A stream beside the device's default one."""

    @abstractmethod
    def use(self) -> AbstractContextManager[object]:
        """Make it current."""

    @abstractmethod
    def delay(self, amount: float) -> None:
        """Keep it busy for so many units; a unit is a few microseconds at least."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait for this stream and for no other."""


class Instruments:
    """Instruments of a device of which nothing is known: everything is lacking. Subclasses override what they have.

    Attributes:
        device: the one under test.
        other: another device of the same backend, itself if there is none.
    """

    def __init__(self, device: Device, devices: Sequence[Device]) -> None:
        self.device = device
        others = [d for d in devices if d.torch_device != device.torch_device]
        self.other = others[0] if others else device

    def lacks(self, capability: Capability) -> str:
        """Why not, empty if it is there."""
        return f"{self.device.name} ({self.device.torch_device.type}) offers the harness no {capability}"

    # -- devices -----------------------------------------------------------------------------------------------------

    def current(self) -> int:
        """Index of this thread's current device, as the driver says."""
        raise self._missing("devices")

    def use(self, device: Device) -> AbstractContextManager[object]:
        """Make it current for the block, without the backend."""
        return nullcontext()

    # -- streams -----------------------------------------------------------------------------------------------------

    def stream(self) -> SideStream:
        """A side stream; the same one each time."""
        raise self._missing("streams")

    def peek(self, tensor: torch.Tensor) -> torch.Tensor:
        """A host copy of what the memory holds now: waits for nothing that was issued."""
        raise self._missing("streams")

    # -- memory ------------------------------------------------------------------------------------------------------

    def allocated(self, device: Device) -> int:
        """Bytes held now."""
        raise self._missing("memory")

    def ever_allocated(self, device: Device) -> int:
        """Bytes allocated since the process began, freed ones included."""
        raise self._missing("memory")

    def exhausted(self, device: Device) -> AbstractContextManager[object]:
        """Inside, no new memory of the device is to be had."""
        raise self._missing("exhaustion")

    # -- work --------------------------------------------------------------------------------------------------------

    def recording(self) -> AbstractContextManager[Recording]:
        """What the device does in the block, which ends with a wait for it."""
        raise self._missing("activity")

    def arm_failure(self) -> None:
        """The next kernel that is launched fails when it runs, after its launch has returned."""
        raise self._missing("failures")

    def _missing(self, capability: Capability) -> ConformanceError:
        return ConformanceError(self.lacks(capability))


def instruments(bench: Bench) -> Instruments:
    """The instruments of a bench's device."""
    found = bench.memo.get("instruments")
    if not isinstance(found, Instruments) or found.device is not bench.device:
        found = bench.memo["instruments"] = _open(bench.device, bench.backend.devices())
    return found


def _open(device: Device, devices: Sequence[Device]) -> Instruments:
    from polyaccel_conformance.harness.torch_devices import CudaInstruments, TorchInstruments
    from polyaccel_conformance.simulated.device import SimulatedDevice
    from polyaccel_conformance.simulated.instruments import SimulatedInstruments

    if isinstance(device, SimulatedDevice):
        return SimulatedInstruments(device, devices)
    kind = device.torch_device.type
    if kind == "cuda":
        return CudaInstruments(device, devices)
    return Instruments(device, devices) if kind == "cpu" else TorchInstruments(device, devices)
