"""Who a rank is: its process, its device, and how it talks."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from dataclasses import dataclass

import torch

import polyaccel
from polyaccel.backend import Backend, Communicator, Device
from polyaccel.backend.registry import installed


@dataclass(frozen=True, slots=True, kw_only=True)
class RankIdentity:
    """What each rank says of itself, recorded in the log, so that several devices cannot be claimed where there is one.

    Attributes:
        rank, world_size: which of how many.
        pid, host: of its process.
        backend, version: its name, and the distribution that it came with.
        device, device_index: the backend's name of it and number on this host.
        device_id: what tells the hardware apart on its host (:func:`device_id`).
        transport: the communicator's.
        simulated: the device is no hardware.
        fork_safe: the backend may follow a fork.
    """

    rank: int
    world_size: int
    pid: int
    host: str
    backend: str
    version: str
    device: str
    device_index: int
    device_id: str
    transport: str
    torch_version: str
    simulated: bool = False
    fork_safe: bool = True

    @classmethod
    def of(cls, backend: Backend, device: Device, comm: Communicator) -> RankIdentity:
        """Of this process."""
        return cls(
            rank=comm.rank,
            world_size=comm.world_size,
            pid=os.getpid(),
            host=platform.node(),
            backend=backend.name,
            version=_version(backend.name),
            device=device.name,
            device_index=device.index,
            device_id=device_id(device),
            transport=comm.transport,
            torch_version=torch.__version__,
            simulated=backend.simulated,
            fork_safe=backend.fork_safe,
        )


def device_id(device: Device) -> str:
    """The driver's own identifier of a device where torch knows one, else torch's name for it."""
    kind = device.torch_device.type
    if kind == "cpu":
        return kind
    found: object | None = None
    # Some drivers answer each property when it is read.
    with suppress(RuntimeError):
        found = getattr(device_properties(device.torch_device), "uuid", None)
    return str(device.torch_device) if found is None else f"{kind} {found}"


def device_properties(device: torch.device) -> object | None:
    """What torch's module for the device says of it; None where it has nothing to say.

    Raises:
        RuntimeError: the driver does not answer, as some do not for a device that nothing has used yet.
    """
    if device.type in ("cpu", "meta"):
        return None
    describe = getattr(torch.get_device_module(device.type), "get_device_properties", None)
    found: object = None if describe is None else describe(device)
    return found


def _version(name: str) -> str:
    own = next((entry for entry in installed() if entry.name == name), None)
    return f"polyaccel {polyaccel.__version__}" if own is None else f"{own.distribution} {own.version}"
