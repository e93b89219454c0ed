"""The communication domains of this process, by handle and by name."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from threading import Lock
from typing import TYPE_CHECKING

from .codes import HcclRefused, Result
from .domain import Domain

if TYPE_CHECKING:
    from ..simulator import Simulator


class Domains:
    """Handles are small numbers, handed to torch_npu as HcclComm pointers."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._numbers = itertools.count(1)
        self._by_handle: dict[int, Domain] = {}

    def add(self, domain: Domain) -> int:
        """Keep a domain; returns its handle."""
        with self._lock:
            handle = next(self._numbers) << 4
            self._by_handle[handle] = domain
        return handle

    def get(self, function: str, handle: int | None) -> Domain:
        """The domain of a handle; HCCL_E_PTR for a null one, HCCL_E_NOT_FOUND for one that was destroyed."""
        if not handle:
            raise HcclRefused(Result.POINTER, f"{function}: the communicator is a null pointer.")
        found = self._by_handle.get(handle)
        if found is None:
            raise HcclRefused(Result.NOT_FOUND, f"{function}: communicator {handle:#x} does not exist (any more).")
        return found

    def find(self, name: str) -> Domain | None:
        """The domain called `name`, as fused operators name it."""
        return next((domain for domain in self._by_handle.values() if domain.name == name), None)

    def remove(self, function: str, handle: int | None) -> None:
        """Destroy a domain."""
        self.get(function, handle).close()
        with self._lock:
            self._by_handle.pop(handle or 0, None)

    def __iter__(self) -> Iterator[Domain]:
        return iter(list(self._by_handle.values()))


def domains_of(simulator: Simulator) -> Domains:
    """The domains of a simulated machine, the same object for all calls."""
    found = simulator.communicators.get("domains")
    if found is None:
        found = simulator.communicators.setdefault("domains", Domains())
    assert isinstance(found, Domains)
    return found
