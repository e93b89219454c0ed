"""The engine's adapters: registered by name, resident in slots while there is room, swapped in when a request needs
them.

Runs on the engine's thread. The scheduler sees it as an :class:`~polyaccel.engine.adapter_table.AdapterTable`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from polyaccel.backend.errors import (
    AdapterError,
    AdapterNotFound,
    ConfigurationError,
    EngineDead,
    RequestRejected,
)
from polyaccel.engine.adapter_table import AdapterSlots
from polyaccel.engine.executor import Executor, PreparedHandle
from polyaccel.lora.mix import AdapterMix
from polyaccel.lora.receipt import AdapterReceipt
from polyaccel.lora.slots import SlotAllocator


@dataclass(slots=True)
class _Registered:
    path: str
    options: dict[str, bool]
    rank_rows: int
    receipt: AdapterReceipt
    pinned: bool = False
    leaving: bool = False
    waiting: int = 0
    prepared: Future[PreparedHandle] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterInfo:
    """A line of ``llm.adapters.list()``. ``resident``: in a device slot now; ``users``: running requests that name
    it."""

    name: str
    path: str
    rank: int
    nbytes: int
    resident: bool
    pinned: bool
    merged: bool
    users: int
    generation: int


class AdapterManager:
    """Implements the scheduler's table over the executor's slots.

    ``slots`` and ``rank_rows`` of 0 mean that adapters are switched off. ``on_change`` is called after the base weights
    changed, so that cached keys and values are dropped.
    """

    def __init__(self, executor: Executor, on_change: Callable[[], None]) -> None:
        self._executor = executor
        self._on_change = on_change
        capacity = executor.capacity
        enabled = capacity.adapter_slots > 0
        self._slots = SlotAllocator(capacity.adapter_slots, capacity.rank_rows) if enabled else None
        self._registered: dict[str, _Registered] = {}
        self._merged: dict[str, float] = {}
        self._background = ThreadPoolExecutor(max_workers=1, thread_name_prefix="polyaccel-adapters")

    # -- the scheduler's side ------------------------------------------------------------------------------------------

    def validate(self, mix: AdapterMix) -> None:
        """Refuse a mix that can never run, before its request is queued.

        Raises:
            AdapterNotFound: a name that is not loaded.
            RequestRejected: a merged adapter, or more than fits at once.
        """
        if not mix:
            return
        slots = self._require_slots()
        for name, _ in mix:
            entry = self._get(name)
            if entry.leaving:
                raise AdapterNotFound(f"adapter {name!r} is being unloaded")
            if name in self._merged:
                raise RequestRejected(
                    f"adapter {name!r} is merged into the base model and would be applied twice; unmerge it first"
                )
        rows = sum(self._registered[name].rank_rows for name, _ in mix)
        if len(mix) > slots.slots or rows > slots.rank_rows:
            raise RequestRejected(
                f"a mix of {len(mix)} adapters with ranks summing to {rows} exceeds adapter_slots={slots.slots} or "
                f"adapter_rank_rows={slots.rank_rows}"
            )

    def acquire(self, mix: AdapterMix) -> AdapterSlots | None:
        slots = self._require_slots()
        missing = [name for name, _ in mix if name not in slots]
        if missing and not self._swap_in_all(missing, keep=mix):
            return None
        for name, _ in mix:
            slots.acquire(name)
        return tuple((slots.get(name).where.slot, weight) for name, weight in mix)

    def release(self, mix: AdapterMix) -> None:
        slots = self._require_slots()
        for name, _ in mix:
            slots.release(name)

    def cache_key(self, mix: AdapterMix) -> Hashable:
        slots = self._require_slots()
        return tuple((slots.get(name).generation, weight) for name, weight in mix)

    # -- loading -------------------------------------------------------------------------------------------------------

    def commit(
        self, name: str, path: str, handle: PreparedHandle, *, pin: bool, options: dict[str, bool]
    ) -> AdapterReceipt | None:
        """Give a prepared adapter its slot, evicting idle adapters where needed; None while every slot is in use.

        Raises:
            AdapterError: the name is taken, or it can never fit.
        """
        slots = self._require_slots()
        if name in self._registered:
            raise AdapterError(f"adapter {name!r} is loaded already; unload it first")
        if not self._make_room(handle.max_rank, keep=()):
            return None
        receipt = self._place(name, handle)
        self._registered[name] = _Registered(path, options, max(handle.max_rank, 1), receipt)
        if pin:
            slots.pin(name)
            self._registered[name].pinned = True
        return receipt

    def begin_unload(self, name: str) -> None:
        """New requests are refused from here on; running ones finish."""
        if name in self._merged:
            raise AdapterError(f"adapter {name!r} is merged into the base model; unmerge it before unloading")
        self._get(name).leaving = True

    def finish_unload(self, name: str) -> bool:
        """Free the slot once nobody uses it; False while somebody does."""
        slots = self._require_slots()
        entry = self._get(name)
        prepared = entry.prepared
        if entry.waiting or (name in slots and slots.get(name).users) or (prepared is not None and not prepared.done()):
            return False
        if name in slots:
            if entry.pinned:
                slots.unpin(name)
            self._executor.clear_adapter(slots.free(name).slot)
        if prepared is not None and prepared.exception() is None:
            self._executor.discard_adapter(prepared.result())
        del self._registered[name]
        return True

    def expect(self, mix: AdapterMix, count: int) -> None:
        """Count queued requests (``count`` +1 or -1) so that unloading waits for them too."""
        for name, _ in mix:
            if name in self._registered:
                self._registered[name].waiting += count

    def pin(self, name: str, pinned: bool) -> None:
        """Keep a resident adapter from being evicted, or allow it again."""
        slots = self._require_slots()
        entry = self._get(name)
        if name not in slots and pinned:
            raise AdapterError(f"adapter {name!r} is not resident now; use it once, then pin it")
        if pinned != entry.pinned and name in slots:
            (slots.pin if pinned else slots.unpin)(name)
        entry.pinned = pinned

    def receipt(self, name: str) -> AdapterReceipt:
        return self._get(name).receipt

    def list(self) -> list[AdapterInfo]:
        slots = self._slots
        rows = []
        for name, entry in self._registered.items():
            loaded = slots.get(name) if slots is not None and name in slots else None
            rows.append(
                AdapterInfo(
                    name=name,
                    path=entry.path,
                    rank=entry.rank_rows,
                    nbytes=entry.receipt.file_bytes,
                    resident=loaded is not None,
                    pinned=entry.pinned,
                    merged=name in self._merged,
                    users=0 if loaded is None else loaded.users,
                    generation=entry.receipt.generation,
                )
            )
        return rows

    # -- merging -------------------------------------------------------------------------------------------------------

    def merge(self, name: str, weight: float) -> None:
        """Add the adapter to the base weights. No step is in flight and no request is running."""
        entry = self._get(name)
        if name in self._merged:
            raise AdapterError(f"adapter {name!r} is merged already")
        try:
            self._executor.merge_adapter(entry.path, weight)
        except EngineDead:
            raise
        except Exception:
            self._restore_merged()
            raise
        self._merged[name] = weight
        self._on_change()

    def _restore_merged(self) -> None:
        """Bring the weights back to what is merged after a merge that failed on the way, or on some ranks only."""
        self._executor.unmerge_adapters()
        for name, weight in self._merged.items():
            self._executor.merge_adapter(self._get(name).path, weight)

    def unmerge(self) -> None:
        """Restore the base weights bit for bit."""
        if not self._merged:
            raise AdapterError("no adapter is merged")
        self._executor.unmerge_adapters()
        self._merged.clear()
        self._on_change()

    def close(self) -> None:
        """Stop the background thread, once the executor is closed and gives its last answer. Idempotent."""
        self._background.shutdown(wait=True, cancel_futures=True)

    # -- slots ---------------------------------------------------------------------------------------------------------

    def _swap_in_all(self, names: Sequence[str], keep: AdapterMix) -> bool:
        # All are started before any is waited for.
        return not [name for name in names if not self._swap_in(name, keep)]

    def _swap_in(self, name: str, keep: AdapterMix) -> bool:
        """Bring a registered adapter back into a slot; False while it is being read or no slot is free."""
        entry = self._get(name)
        if entry.prepared is None:
            entry.prepared = self._background.submit(self._executor.prepare_adapter, entry.path, **entry.options)
            return False
        if not entry.prepared.done():
            return False
        prepared = entry.prepared
        if prepared.exception() is not None:
            entry.prepared = None
            prepared.result()
        handle = prepared.result()
        if not self._make_room(handle.max_rank, keep):
            return False
        entry.prepared = None
        entry.rank_rows = max(handle.max_rank, 1)
        entry.receipt = self._place(name, handle)
        if entry.pinned:
            self._require_slots().pin(name)
        return True

    def _make_room(self, rank_rows: int, keep: AdapterMix) -> bool:
        """Evict idle adapters until ``rank_rows`` fit; False if adapters in use leave too little."""
        slots = self._require_slots()
        held = [name for name, _ in keep if name in slots]
        for name in held:
            slots.acquire(name)
        try:
            victims = slots.plan_eviction(max(rank_rows, 1)) if self._possible(rank_rows) else None
        finally:
            for name in held:
                slots.release(name)
        if victims is None:
            return False
        for victim in victims:
            self._executor.clear_adapter(slots.free(victim).slot)
        return True

    def _possible(self, rank_rows: int) -> bool:
        slots = self._require_slots()
        if rank_rows > slots.rank_rows:
            raise AdapterError(f"the adapter needs {rank_rows} rank rows; raise adapter_rank_rows={slots.rank_rows}")
        return True

    def _place(self, name: str, handle: PreparedHandle) -> AdapterReceipt:
        slots = self._require_slots()
        where = slots.allocate(name, max(handle.max_rank, 1))
        try:
            return self._executor.commit_adapter(handle, name, where, slots.get(name).generation)
        except BaseException:
            slots.free(name)
            raise

    def _get(self, name: str) -> _Registered:
        entry = self._registered.get(name)
        if entry is None:
            loaded = ", ".join(map(repr, self._registered)) or "none"
            raise AdapterNotFound(f"adapter {name!r} is not loaded; loaded are: {loaded}")
        return entry

    def _require_slots(self) -> SlotAllocator:
        if self._slots is None:
            raise ConfigurationError(
                "adapters are switched off: start the engine with adapter_slots and adapter_rank_rows above 0"
            )
        return self._slots
