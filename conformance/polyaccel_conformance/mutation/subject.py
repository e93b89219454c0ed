"""What workers open: the file of a table, whose attributes are mutants by file, a digest of their key and the file's.

``moe_5e21_0f3c`` is everything as composites on the CPU with that mutant of ``moe.py`` installed, provided that the
file still has the digest ``0f3c``; ``healthy`` the same without.
"""

from __future__ import annotations

import hashlib
import resource
from collections.abc import Callable

from polyaccel.backend import Backend, TableBackend
from polyaccel_conformance.errors import UsageError
from polyaccel_conformance.mutation.edit import Edit
from polyaccel_conformance.mutation.install import digests, edits_in, install

HEALTHY = "healthy"
MEMORY = 6 << 30
"""Bytes after which a mutant that asks for ever more memory ends."""


def named(edit: Edit, digest: str) -> str:
    """The attribute for a mutant of a file that has this digest."""
    return f"{edit.file.removesuffix('.py')}_{_mark(edit)}_{digest}"


def _mark(edit: Edit) -> str:
    return hashlib.sha256(edit.key.encode()).hexdigest()[:16]


def install_named(name: str) -> None:
    """Install what :func:`named` names in this process; nothing for :data:`HEALTHY`.

    Raises:
        UsageError: the file has been edited since.
    """
    if name == HEALTHY:
        return
    head, _, digest = name.rpartition("_")
    stem, _, mark = head.rpartition("_")
    if digests()[f"{stem}.py"] != digest:
        raise UsageError(f"{stem}.py has been edited since; begin again")
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    (edit,) = (edit for edit in edits_in(f"{stem}.py") if _mark(edit) == mark)
    install(edit)


def __getattr__(name: str) -> Callable[[], Backend]:
    if name != HEALTHY and name.count("_") < 2:
        raise AttributeError(name)

    def opened() -> Backend:
        install_named(name)
        return TableBackend("cpu", {}, name="composite")

    return opened
