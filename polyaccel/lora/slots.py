"""Which adapter lies in which slot and rank rows: the engine's single truth, sent to every device rank.

A slot is one loaded adapter; rank rows are the shared room for ranks, of which a slot takes one contiguous range, the
same at every site. Decisions depend only on the calls made, in order; there is no clock and no hash order in them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from polyaccel.backend.adapter_store import SlotRange
from polyaccel.backend.errors import AdapterError, AdapterNotFound, ConfigurationError


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedAdapter:
    """A snapshot of one loaded adapter.

    ``generation`` is the number of its load and is never given twice, so that cached results of an earlier load
    cannot be taken for this one's. ``users`` are running requests that name it; ``last_used`` orders adapters by last
    use.
    """

    name: str
    where: SlotRange
    generation: int
    pinned: bool
    users: int
    last_used: int


class SlotAllocator:
    """Slots ``0..slots-1`` and rank rows ``0..rank_rows-1`` handed out first-fit. Not thread-safe; host only."""

    def __init__(self, slots: int, rank_rows: int) -> None:
        if slots < 1 or rank_rows < 1:
            raise ConfigurationError(f"adapter_slots={slots} and adapter_rank_rows={rank_rows} must both be at least 1")
        self.slots = slots
        self.rank_rows = rank_rows
        self._loaded: dict[str, LoadedAdapter] = {}
        self._generation = 0
        self._clock = 0

    def __contains__(self, name: str) -> bool:
        return name in self._loaded

    def __len__(self) -> int:
        return len(self._loaded)

    @property
    def free_rank_rows(self) -> int:
        """Rank rows in no slot; they need not be contiguous."""
        return self.rank_rows - sum(adapter.where.rank_rows for adapter in self._loaded.values())

    def loaded(self) -> tuple[LoadedAdapter, ...]:
        """All loaded adapters, in the order of their loads."""
        return tuple(self._loaded.values())

    def get(self, name: str) -> LoadedAdapter:
        """The adapter's snapshot.

        Raises:
            AdapterNotFound: no adapter of this name is loaded.
        """
        found = self._loaded.get(name)
        if found is None:
            names = ", ".join(repr(other) for other in self._loaded) or "none"
            raise AdapterNotFound(f"adapter {name!r} is not loaded; loaded are: {names}")
        return found

    def allocate(self, name: str, rank_rows: int) -> SlotRange:
        """Take the lowest free slot and the first contiguous run of free rank rows.

        Raises:
            AdapterError: the name is loaded already, or there is no room; the message gives what is free and what to
            do.
        """
        if not name or name in self._loaded:
            why = f"adapter {name!r} is loaded already; unload it first" if name else "an adapter needs a name"
            raise AdapterError(why)
        self._check_possible(name, rank_rows)
        where = self._fit(rank_rows, self._loaded)
        if where is None:
            raise AdapterError(self._no_room(name, rank_rows))
        self._generation += 1
        self._clock += 1
        self._loaded[name] = LoadedAdapter(
            name=name, where=where, generation=self._generation, pinned=False, users=0, last_used=self._clock
        )
        return where

    def plan_eviction(self, rank_rows: int) -> tuple[str, ...] | None:
        """Adapters to free so that ``allocate`` of ``rank_rows`` succeeds: least recently used first, none in vain.

        Empty where there is room already; None where pinned and used adapters leave too little whatever is evicted.
        Changes nothing.
        """
        remaining = dict(self._loaded)
        victims: list[str] = []
        candidates = list(self.eviction_candidates())
        while self._fit(rank_rows, remaining) is None:
            if not candidates:
                return None
            victims.append(candidates.pop(0))
            del remaining[victims[-1]]
        for name in reversed(victims[:]):
            kept = remaining | {name: self._loaded[name]}
            if self._fit(rank_rows, kept) is not None:
                remaining = kept
                victims.remove(name)
        return tuple(victims)

    def eviction_candidates(self) -> tuple[str, ...]:
        """Names that may be evicted, neither pinned nor in use, least recently used first."""
        idle = [adapter for adapter in self._loaded.values() if not adapter.pinned and not adapter.users]
        return tuple(adapter.name for adapter in sorted(idle, key=lambda adapter: adapter.last_used))

    def free(self, name: str) -> SlotRange:
        """Give the adapter's slot and rank rows back; returns what was freed.

        Raises:
            AdapterNotFound: not loaded.
            AdapterError: pinned, or in use by running requests.
        """
        adapter = self.get(name)
        if adapter.users:
            raise AdapterError(f"adapter {name!r} is in use by {adapter.users} running requests; wait or abort them")
        if adapter.pinned:
            raise AdapterError(f"adapter {name!r} is pinned; unpin it first")
        del self._loaded[name]
        return adapter.where

    def acquire(self, name: str) -> LoadedAdapter:
        """Count one more running request on the adapter and mark it as just used. Raises as :meth:`get`."""
        adapter = self.get(name)
        self._clock += 1
        self._loaded[name] = replace(adapter, users=adapter.users + 1, last_used=self._clock)
        return self._loaded[name]

    def release(self, name: str) -> LoadedAdapter:
        """Count one running request less.

        Raises:
            AdapterNotFound: not loaded.
            AdapterError: no request uses it.
        """
        adapter = self.get(name)
        if not adapter.users:
            raise AdapterError(f"adapter {name!r} is released more often than acquired")
        self._loaded[name] = replace(adapter, users=adapter.users - 1)
        return self._loaded[name]

    def pin(self, name: str) -> None:
        """Keep the adapter from eviction. Raises as :meth:`get`."""
        self._loaded[name] = replace(self.get(name), pinned=True)

    def unpin(self, name: str) -> None:
        """Allow eviction again. Raises as :meth:`get`."""
        self._loaded[name] = replace(self.get(name), pinned=False)

    def _fit(self, rank_rows: int, loaded: dict[str, LoadedAdapter]) -> SlotRange | None:
        taken = {adapter.where.slot for adapter in loaded.values()}
        slot = next((slot for slot in range(self.slots) if slot not in taken), None)
        if slot is None:
            return None
        for start, stop in self._gaps(loaded):
            if stop - start >= rank_rows:
                return SlotRange(slot=slot, first_rank_row=start, rank_rows=rank_rows)
        return None

    def _gaps(self, loaded: dict[str, LoadedAdapter]) -> list[tuple[int, int]]:
        gaps: list[tuple[int, int]] = []
        end = 0
        for where in sorted((adapter.where for adapter in loaded.values()), key=lambda where: where.first_rank_row):
            if where.first_rank_row > end:
                gaps.append((end, where.first_rank_row))
            end = where.first_rank_row + where.rank_rows
        return [*gaps, (end, self.rank_rows)] if end < self.rank_rows else gaps

    def _check_possible(self, name: str, rank_rows: int) -> None:
        if not 1 <= rank_rows <= self.rank_rows:
            raise AdapterError(
                f"adapter {name!r} needs {rank_rows} rank rows, the engine has {self.rank_rows}; "
                "raise adapter_rank_rows or use an adapter of lower rank"
            )

    def _no_room(self, name: str, rank_rows: int) -> str:
        largest = max((stop - start for start, stop in self._gaps(self._loaded)), default=0)
        pinned = sum(adapter.pinned for adapter in self._loaded.values())
        used = sum(adapter.users > 0 for adapter in self._loaded.values())
        return (
            f"no room for adapter {name!r}: it needs 1 slot and {rank_rows} contiguous rank rows; free are "
            f"{self.slots - len(self._loaded)} of {self.slots} slots and {self.free_rank_rows} of {self.rank_rows} "
            f"rank rows, at most {largest} contiguous ({pinned} adapters pinned, {used} in use); raise adapter_slots "
            "or adapter_rank_rows, or unload or unpin an adapter"
        )
