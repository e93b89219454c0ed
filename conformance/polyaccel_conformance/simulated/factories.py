"""torch's own factories (``torch.zeros(..., device=...)``, ``x.to(device)``) on virtual devices.

torch has one name for devices from outside of it and numbers them through the whole process. So the devices of all
machines share these numbers, and what torch is asked to make on one is found by its number here; a process in which
another package has claimed that name keeps it, and virtual devices are then reached through the contract alone.
"""

from __future__ import annotations

import gc
import sys
import types
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from polyaccel.backend.errors import ConfigurationError

if TYPE_CHECKING:
    from polyaccel_conformance.simulated.runtime import VirtualDevice

DEVICE_TYPE = "privateuseone"
LARGEST = 127
"""torch's device numbers are signed bytes."""

_COMPUTED = ("arange", "arange.start", "arange.start_step", "eye", "eye.m", "linspace", "randperm")
"""Factories that torch would build from an empty tensor that it resizes."""

_MODULE = f"torch.{DEVICE_TYPE}"
_HELD, _LIBRARY = "virtual_devices", "virtual_factories"
"""Attributes of torch's module for the devices."""


def claim_numbers(count: int) -> int:
    """The first of ``count`` free numbers in a row.

    Raises:
        ConfigurationError: too many virtual devices are alive.
    """
    devices = _devices()
    for attempt in range(2):
        for first in range(LARGEST - count + 1):
            if all(number not in devices for number in range(first, first + count)):
                return first
        if not attempt:
            # Machines are cycles of references.
            gc.collect()
    raise ConfigurationError(f"{len(devices)} virtual devices are alive; torch numbers at most {LARGEST}")


def announce(number: int, device: VirtualDevice) -> None:
    """From now on the number means this device."""
    _devices()[number] = device


def device_of(device: torch.device) -> VirtualDevice:
    """The virtual device behind torch's name for it.

    Raises:
        ConfigurationError: there is none.
    """
    found = _devices().get(device.index or 0)
    if found is None:
        raise ConfigurationError(f"{device} is no virtual device of this process")
    return found


def virtual_device(device: torch.device) -> VirtualDevice | None:
    """The same, None for any other device."""
    return _devices().get(device.index or 0) if device.type == DEVICE_TYPE else None


def _devices() -> weakref.WeakValueDictionary[int, VirtualDevice]:
    """Which device each number means. The numbers are torch's, which has one list of devices a process, so that they
    are kept in torch's own module for them."""
    module = sys.modules.get(_MODULE)
    if module is None:
        module = types.ModuleType(_MODULE)
        if torch._C._get_privateuse1_backend_name() == DEVICE_TYPE:
            # torch imports the device's module before it makes a tensor there.
            torch._register_device_module(DEVICE_TYPE, module)  # type: ignore[no-untyped-call]
            setattr(module, _LIBRARY, _factories())
        else:
            sys.modules[_MODULE] = module
    if not hasattr(module, _HELD):
        setattr(module, _HELD, weakref.WeakValueDictionary())
    found: weakref.WeakValueDictionary[int, VirtualDevice] = getattr(module, _HELD)
    return found


def _factories() -> torch.library.Library:
    """Tell torch how it makes tensors on virtual devices, for as long as the result lives."""
    library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    functions = {"empty.memory_format": _empty, "empty_strided": _empty_strided}
    for name, function in {**functions, **{name: _computed(name) for name in _COMPUTED}}.items():
        library.impl(name, function, "PrivateUse1")  # type: ignore[no-untyped-call]
    return library


def _empty(size: Sequence[int], *, dtype: torch.dtype | None = None, device: torch.device, **_: object) -> torch.Tensor:
    from polyaccel_conformance.simulated.tensor import empty_on

    _refuse_below_python(device)
    return empty_on(device_of(device), size, dtype or torch.get_default_dtype())


def _empty_strided(
    size: Sequence[int], stride: Sequence[int], *, dtype: torch.dtype | None = None, device: torch.device, **_: object
) -> torch.Tensor:
    from polyaccel_conformance.simulated.tensor import empty_on

    _refuse_below_python(device)
    span = sum((n - 1) * s for n, s in zip(size, stride, strict=True)) + 1 if all(size) else 0
    return empty_on(device_of(device), (span,), dtype or torch.get_default_dtype()).as_strided(size, stride)


def _computed(name: str) -> Callable[..., torch.Tensor]:
    packet, _, overload = name.partition(".")
    operator = getattr(getattr(torch.ops.aten, packet), overload or "default")

    def compute(*args: Any, device: torch.device, **kwargs: Any) -> torch.Tensor:
        host: torch.Tensor = operator(*args, **kwargs, device=torch.device("cpu"))
        made = _empty(host.shape, dtype=host.dtype, device=device)
        return made.copy_(host)

    return compute


def _refuse_below_python(device: torch.device) -> None:
    # torch.tensor(data, device=...) fills what it gets without asking its class.
    if torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.Python):
        raise RuntimeError(f"torch.tensor does not work on {device}: make it on the host and move it there with .to()")
