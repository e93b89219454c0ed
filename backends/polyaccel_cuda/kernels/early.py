"""Launches that begin while the kernel before them ends: programmatic dependent launch, compute capability 9 and newer.

A kernel launched so may start when every program of its predecessor has let it, or has ended. Its first act is
:func:`follow`, which waits for the predecessor's end. The predecessor did the same, so everything before has ended too
and is seen: what is saved is the time to start programs, never an order of reads and writes.

Whether a kernel lets its successor start at once is measured: a waiting program occupies a place. Products always do;
the short kernels between them for some numbers of rows, see :func:`lets_at_once`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_EARLY: ContextVar[bool] = ContextVar("early", default=False)
LETS: tl.constexpr = tl.constexpr(1)
"""``EARLY`` of a launch that waits and then lets its successor start; 2 only waits; 0 is an ordinary launch."""


def can_begin_early(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)


@contextmanager
def early_launches(can: bool = True) -> Iterator[None]:
    """Kernels of a decode step that are launched inside begin early; none does unless the device ``can``."""
    token = _EARLY.set(can)
    try:
        yield
    finally:
        _EARLY.reset(token)


def lets_at_once(rows: int) -> bool:
    """Whether a short kernel of a step of so many rows lets its successor start at once.

    With one row it is few programs. With up to 32 its successor's waiting ones cost more than they save, 7.03 ms a step
    instead of 6.79; with 64 they do not, 8.25 and 8.30 (Mistral-7B shape, H100).
    """
    return rows == 1 or rows > 32


def early(lets: bool = True) -> dict[str, int | bool]:
    """Keyword arguments of a launch whose kernel takes ``EARLY`` and calls :func:`follow`.

    ``lets``: its successor may start at once.
    """
    return {"EARLY": 1 if lets else 2, "launch_pdl": True} if _EARLY.get() else {"EARLY": 0}


@triton.jit
def follow(EARLY: tl.constexpr):
    """From here on all that was launched before has ended and is seen."""
    if EARLY:
        gdc_wait()
        if EARLY == LETS:
            gdc_launch_dependents()
