"""The harness's instruments on devices that torch has a module for: ``torch.cuda``, ``torch.npu``, a vendor's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]

from polyaccel.backend import Device
from polyaccel_conformance.harness.devices import Activity, Capability, Instruments, Recording, SideStream

_NEEDED: Mapping[Capability, tuple[str, ...]] = MappingProxyType(
    {
        "devices": ("current_device", "device"),
        "memory": ("memory_allocated", "memory_stats"),
        "exhaustion": ("set_per_process_memory_fraction", "empty_cache"),
    }
)
"""What a capability takes of the module, with the meaning that it has in ``torch.cuda``."""


class TorchInstruments(Instruments):
    """A device type's module, as far as it has what ``torch.cuda`` has. Memory is that of torch's caching allocator:
    what a library takes from the driver is not seen."""

    def __init__(self, device: Device, devices: Sequence[Device]) -> None:
        super().__init__(device, devices)
        self._module: Any = getattr(torch, device.torch_device.type, None)

    def lacks(self, capability: Capability) -> str:
        needed = _NEEDED.get(capability)
        if needed is None:
            return super().lacks(capability)
        if absent := [name for name in needed if not hasattr(self._module, name)]:
            return f"torch.{self.device.torch_device.type} has no {absent[0]}"
        if capability == "devices" and self.other is self.device:
            return f"the backend has one device, {self.device.name}"
        return ""

    def current(self) -> int:
        return int(self._module.current_device())

    def use(self, device: Device) -> AbstractContextManager[object]:
        scope: AbstractContextManager[object] = self._module.device(device.torch_device)
        return scope

    def allocated(self, device: Device) -> int:
        return int(self._module.memory_allocated(device.torch_device))

    def ever_allocated(self, device: Device) -> int:
        return int(self._module.memory_stats(device.torch_device).get("allocated_bytes.all.allocated", 0))

    @contextmanager
    def exhausted(self, device: Device) -> Iterator[None]:
        # Blocks that are split stay reserved; the fraction forbids new ones only.
        self._limit(device, 0.0)
        try:
            yield
        finally:
            self._limit(device, 1.0)

    def _limit(self, device: Device, fraction: float) -> None:
        # In the scope of the device: torch_npu leaves it current, and the caller must not notice.
        with self.use(device):
            self._module.empty_cache()
            self._module.set_per_process_memory_fraction(fraction, device.torch_device)


# -- CUDA --------------------------------------------------------------------------------------------------------------

_CYCLES = 10_000
"""Clock cycles of one unit of delay, 5 to 10 microseconds."""


@dataclass(frozen=True, slots=True)
class CudaStream(SideStream):
    """A stream of torch's pool."""

    stream: torch.cuda.Stream

    def use(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self.stream)

    def delay(self, amount: float) -> None:
        with torch.cuda.stream(self.stream):
            torch.cuda._sleep(int(amount * _CYCLES))  # type: ignore[no-untyped-call]

    def synchronize(self) -> None:
        self.stream.synchronize()


@dataclass(slots=True)
class _CudaStreams:
    side: CudaStream
    reader: torch.cuda.Stream


class CudaInstruments(TorchInstruments):
    """What torch.cuda has beside that: streams that can be kept busy, and a profiler."""

    def __init__(self, device: Device, devices: Sequence[Device]) -> None:
        super().__init__(device, devices)
        self._streams: _CudaStreams | None = None

    def lacks(self, capability: Capability) -> str:
        if capability == "failures":
            return "CUDA has no way to make a chosen kernel fail"
        return "" if capability in ("streams", "activity") else super().lacks(capability)

    def stream(self) -> SideStream:
        return self._own().side

    def peek(self, tensor: torch.Tensor) -> torch.Tensor:
        reader = self._own().reader
        # Pinned, so that the copy waits for nothing but its own stream.
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        with torch.cuda.stream(reader):
            host.copy_(tensor, non_blocking=True)
        reader.synchronize()
        return host

    @contextmanager
    def recording(self) -> Iterator[Recording]:
        found = Recording()
        torch.cuda.synchronize(self.device.torch_device)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            yield found
            torch.cuda.synchronize(self.device.torch_device)
        events = [e for e in profile.events() or () if e.device_type != DeviceType.CPU and not e.is_user_annotation]
        found.activities = tuple(Activity(name=e.name, kind=_cuda_kind(e.name)) for e in events)

    def _own(self) -> _CudaStreams:
        if self._streams is None:
            where = self.device.torch_device
            side = CudaStream(torch.cuda.Stream(device=where))  # type: ignore[no-untyped-call]
            reader = torch.cuda.Stream(device=where)  # type: ignore[no-untyped-call]
            self._streams = _CudaStreams(side, reader)
        return self._streams


def _cuda_kind(name: str) -> str:
    for mark, kind in (("HtoD", "to device"), ("DtoH", "to host"), ("DtoD", "on device"), ("PtoP", "between devices")):
        if name.startswith("Memcpy") and mark in name:
            return kind
    return "fill" if name.startswith("Memset") else "kernel"
