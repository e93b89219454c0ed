"""Which mutants a series takes."""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Sequence

from polyaccel.backend import Backend
from polyaccel_conformance.mutants.catalogue import MUTANTS, found
from polyaccel_conformance.mutants.mutant import Mutant


def chosen(names: Sequence[str]) -> list[Mutant]:
    """The mutants or healthy hosts of these names, all mutants for none.

    Raises:
        UsageError: a name that is none.
    """
    return [found(name) for name in names] if names else list(MUTANTS.values())


def by_date(mutants: Sequence[Mutant], count: int, date: datetime.date) -> list[Mutant]:
    """``count`` of the mutants, the same all day, others on another."""
    return sorted(mutants, key=lambda m: hashlib.sha256(f"{date.isoformat()} {m.name}".encode()).digest())[:count]


def portable_to(backend: Backend) -> list[Mutant]:
    """Mutants that can be planted around this backend's own operators."""
    own = set(backend.table())
    return [mutant for mutant in MUTANTS.values() if mutant.portable and own >= set(mutant.operators)]
