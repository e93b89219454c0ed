"""Which kernels a device really ran, by torch's profiler."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch

# Most of torch's profiler has no types.
_profiler: Any = torch.profiler


def has_profiler(device: torch.device) -> bool:
    """Whether torch's profiler sees the kernels of a device here."""
    kind = _kind(device)
    return kind is not None and kind in _profiler.supported_activities()


def _kind(device: torch.device) -> Any:
    if device.type in ("cpu", "meta"):
        return None
    return getattr(_profiler.ProfilerActivity, "CUDA" if device.type == "cuda" else "PrivateUse1", None)


class KernelTrace:
    """The names of the kernels that a device ran in the block; the device has to be idle before and after.

    Copies and fills by the driver (``Memcpy DtoH``) are in ``copies``.
    """

    def __init__(self, device: torch.device) -> None:
        self._profile: Any = _profiler.profile(activities=[_kind(device)], acc_events=True)
        self.kernels: tuple[str, ...] = ()
        self.copies: tuple[str, ...] = ()

    def __enter__(self) -> KernelTrace:
        self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
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
