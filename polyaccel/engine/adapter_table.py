"""What the scheduler needs to know about adapters: which slots a request's mix occupies."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Protocol

from polyaccel.lora.mix import AdapterMix

AdapterSlots = tuple[tuple[int, float], ...]


class AdapterTable(Protocol):
    """Adapters that are, or can be made, resident in device slots. Host-side; none of its methods waits."""

    def acquire(self, mix: AdapterMix) -> AdapterSlots | None:
        """Hold the mix's adapters in their slots until :meth:`release`; ``(slot, weight)`` entries.

        Called once a request, with a non-empty mix. None says not now (still loading, or every slot is in use): the
        request is set aside, others go on, and it is asked for again in a later step, oldest requests first. An
        exception fails this one request.
        """

    def release(self, mix: AdapterMix) -> None:
        """End one :meth:`acquire`. Every step that names the slots has completed."""

    def cache_key(self, mix: AdapterMix) -> Hashable:
        """What a held mix does to keys and values: load generations and weights. Asked for after acquire."""


class NoAdapters:
    """The table of an engine without adapters."""

    def acquire(self, mix: AdapterMix) -> AdapterSlots | None:
        return ()

    def release(self, mix: AdapterMix) -> None:
        pass

    def cache_key(self, mix: AdapterMix) -> Hashable:
        return mix
