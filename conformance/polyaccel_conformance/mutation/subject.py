"""What workers open: the file of a table, whose attributes are mutants by file and by index in that file's list.

``moe_17`` is everything as composites on the CPU with mutant 17 of ``moe.py`` installed; ``healthy`` the same without.
"""

from __future__ import annotations

import resource
from collections.abc import Callable

from polyaccel.backend import Backend, TableBackend
from polyaccel_conformance.mutation.install import edits_in, install

HEALTHY = "healthy"
MEMORY = 6 << 30
"""Bytes after which a mutant that asks for ever more memory ends."""


def __getattr__(name: str) -> Callable[[], Backend]:
    stem, _, index = name.rpartition("_")
    if name != HEALTHY and not index.isdigit():
        raise AttributeError(name)

    def opened() -> Backend:
        if name != HEALTHY:
            resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
            install(edits_in(f"{stem}.py")[int(index)])
        return TableBackend("cpu", {}, name="composite")

    return opened
