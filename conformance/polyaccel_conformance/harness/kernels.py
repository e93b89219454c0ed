"""Which kernels a device really ran, by torch's profiler."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch

from polyaccel_conformance.simulated.factories import virtual_device

# Most of torch's profiler has no types.
_profiler: Any = torch.profiler


def has_profiler(device: torch.device) -> bool:
    """Whether torch's profiler sees the kernels of a device here. Virtual devices have a trace of their own."""
    return not profiler_refusal(device)


def profiler_refusal(device: torch.device) -> str:
    """Why torch's profiler does not see the kernels of a device here; empty if it does."""
    return "" if virtual_device(device) is not None else _refusal(device.type)


@functools.cache
def _refusal(type_: str) -> str:
    """Asked once a process: an activity that torch supports may still lack the vendor's library, such as CUPTI or
    libmspti, which torch loads when the first trace begins or ends."""
    kind = _kind(type_)
    if kind is None or kind not in _profiler.supported_activities():
        return f"torch's profiler sees no kernels of {type_}"
    try:
        with _profiler.profile(activities=[kind]):
            pass
    except RuntimeError as error:
        said = str(error).strip() or type(error).__name__
        return f"torch's profiler sees no kernels of {type_}: {said.splitlines()[0]}"
    return ""


def launches_unseen(device: torch.device) -> bool:
    """Whether a device may run kernels that torch's dispatcher knows nothing of: then only a profile shows that nothing
    ran, which is too slow for every call. Virtual devices say what they ran at no cost."""
    return has_profiler(device) and virtual_device(device) is None


def _kind(type_: str) -> Any:
    if type_ in ("cpu", "meta"):
        return None
    return getattr(_profiler.ProfilerActivity, "CUDA" if type_ == "cuda" else "PrivateUse1", None)


class KernelTrace:
    """The names of the kernels that a device ran in the block; the device has to be idle before and after.

    Copies and fills by the driver (``Memcpy DtoH``) are in ``copies``.
    """

    def __init__(self, device: torch.device) -> None:
        self._virtual = virtual_device(device)
        self._profile: Any = None
        if self._virtual is None:
            self._profile = _profiler.profile(activities=[_kind(device.type)], acc_events=True)
        self.kernels: tuple[str, ...] = ()
        self.copies: tuple[str, ...] = ()

    def __enter__(self) -> KernelTrace:
        if self._virtual is not None:
            self._virtual.runtime.wait_device(self._virtual)
            self._virtual.trace = []
        else:
            self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._virtual is not None:
            ran, self._virtual.trace = self._virtual.trace or [], None
            self.kernels = tuple(name for name, kind in ran if kind == "kernel")
            self.copies = tuple(name for name, kind in ran if kind not in ("kernel", "mark", "delay"))
            return
        self._profile.__exit__(*error)
        names = [
            str(event.name)
            for event in self._profile.events() or ()
            if "CPU" not in str(event.device_type) and not event.is_user_annotation
        ]
        self.copies = tuple(n for n in names if n.startswith(("Memcpy", "Memset")))
        self.kernels = tuple(n for n in names if not n.startswith(("Memcpy", "Memset")))


def undeclared_kernels(kernels: Sequence[str], declared: Sequence[str]) -> list[str]:
    """Kernels that no declared name matches; ``*`` and ``?`` stand for any characters. Declared names with ``::`` are
    operators of torch and match none."""
    patterns = [d for d in declared if "::" not in d]
    return sorted({k for k in kernels if not any(fnmatchcase(k, p) for p in patterns)})
