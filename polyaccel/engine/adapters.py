"""``llm.adapters``: loading, unloading and merging while requests run."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

from polyaccel.backend.errors import AdapterError
from polyaccel.engine.adapter_manager import AdapterInfo, AdapterManager
from polyaccel.engine.executor import Executor
from polyaccel.engine.loop import EngineLoop
from polyaccel.lora.mix import normalise_mix
from polyaccel.lora.receipt import AdapterReceipt

POLL_SECONDS = 0.005


class Adapters:
    """The adapters of one engine, by name. Safe to use from any thread."""

    def __init__(self, loop: EngineLoop, manager: AdapterManager, executor: Executor) -> None:
        self._loop, self._manager, self._executor = loop, manager, executor

    def load(
        self,
        name: str,
        path: str | os.PathLike[str],
        *,
        pin: bool = False,
        allow_unmatched: bool = False,
        allow_no_effect: bool = False,
        timeout: float = 60.0,
    ) -> AdapterReceipt:
        """Read an adapter folder and make it usable under ``name``; returns what was applied where, and how.

        Reading and packing run beside decode; only the copy to the device is ordered with steps. Idle adapters are
        evicted where there is no room and come back when a request names them.

        Raises:
            AdapterNotFound, AdapterIncompatible: no such folder; it does not fit the model, or uses a refused feature.
            AdapterError: the name is taken, or adapters in use left no room within ``timeout`` seconds.
        """
        if not isinstance(name, str) or not name:
            raise AdapterError(f"an adapter name must be a non-empty string, not {name!r}")
        options = {"allow_unmatched": allow_unmatched, "allow_no_effect": allow_no_effect}
        source = os.fspath(path)
        handle = self._executor.prepare_adapter(source, **options)
        deadline = time.monotonic() + timeout
        try:
            while True:
                receipt = self._loop.call(lambda: self._manager.commit(name, source, handle, pin=pin, options=options))
                if receipt is not None:
                    return receipt
                if time.monotonic() > deadline:
                    raise AdapterError(
                        f"no room for adapter {name!r} within {timeout:g} s: all slots are in use or pinned; raise "
                        f"adapter_slots "
                        "or adapter_rank_rows, or unload one"
                    )
                time.sleep(POLL_SECONDS)
        except BaseException:
            self._loop.call(lambda: self._executor.discard_adapter(handle))
            raise

    def unload(self, name: str) -> None:
        """Refuse new requests for the adapter, let running ones finish, free its slot.

        Raises:
            AdapterNotFound: not loaded.
            AdapterError: merged into the base model.
        """
        self._loop.call(lambda: self._manager.begin_unload(name))
        while not self._loop.call(lambda: self._manager.finish_unload(name)):
            time.sleep(POLL_SECONDS)

    def list(self) -> list[AdapterInfo]:
        return self._loop.call(self._manager.list)

    def receipt(self, name: str) -> AdapterReceipt:
        """The receipt of the adapter's last load. Raises AdapterNotFound."""
        return self._loop.call(lambda: self._manager.receipt(name))

    def pin(self, name: str) -> None:
        """Never evict this adapter. Raises AdapterNotFound."""
        self._loop.call(lambda: self._manager.pin(name, True))

    def unpin(self, name: str) -> None:
        self._loop.call(lambda: self._manager.pin(name, False))

    def merge(self, name: str, weight: float = 1.0) -> None:
        """Add the adapter to the base weights: every later request has it, at no cost a step.

        Waits until every request submitted so far has finished; those submitted meanwhile wait for the merged model.

        Raises:
            AdapterNotFound: not loaded.
            AdapterError: quantised or shared weights, merged already; the weights are as before.
            RequestRejected: a weight that is not a finite number.
        """
        normalise_mix({name: weight})
        self.receipt(name)
        self._loop.call_when_drained(lambda: self._manager.merge(name, weight))

    def unmerge(self) -> None:
        """Restore the base weights bit for bit. Raises AdapterError if nothing is merged."""
        self._loop.call_when_drained(self._manager.unmerge)

    def __contains__(self, name: object) -> bool:
        return any(info.name == name for info in self.list())

    def __iter__(self) -> Iterator[str]:
        return iter([info.name for info in self.list()])
