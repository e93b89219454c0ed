"""All mutants by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from polyaccel.backend import Backend
from polyaccel_conformance.errors import UsageError
from polyaccel_conformance.mutants.adapters import ADAPTERS
from polyaccel_conformance.mutants.arithmetic import ARITHMETIC
from polyaccel_conformance.mutants.choices import CHOICES
from polyaccel_conformance.mutants.conduct import CONDUCT
from polyaccel_conformance.mutants.devices import DEVICES
from polyaccel_conformance.mutants.engine import ENGINE
from polyaccel_conformance.mutants.graphs import GRAPHS
from polyaccel_conformance.mutants.healthy import HOSTS
from polyaccel_conformance.mutants.mutant import Mutant
from polyaccel_conformance.mutants.ranks import RANKS
from polyaccel_conformance.mutants.sequences import SEQUENCES
from polyaccel_conformance.mutants.storage import STORAGE

MUTANTS: Mapping[str, Mutant] = MappingProxyType(
    {
        mutant.name: mutant
        for mutant in (
            *ARITHMETIC,
            *SEQUENCES,
            *ADAPTERS,
            *CHOICES,
            *CONDUCT,
            *STORAGE,
            *DEVICES,
            *GRAPHS,
            *RANKS,
            *ENGINE,
        )
    }
)
HEALTHY: Mapping[str, Mutant] = MappingProxyType({mutant.name: mutant for mutant in HOSTS})
"""Hosts in every wrapper that mutants are made with, and nothing wrong: no check may find anything."""


def found(name: str) -> Mutant:
    """A mutant, or a healthy host, by its name.

    Raises:
        UsageError: there is none.
    """
    mutant = MUTANTS.get(name) or HEALTHY.get(name)
    if mutant is None:
        raise UsageError(f"no mutant {name!r}; there are {', '.join(MUTANTS)}")
    return mutant


def apply_mutant(name: str, backend: Backend) -> Backend:
    """The backend with a planted bug.

    Raises:
        UsageError: no such mutant.
    """
    return found(name).apply(backend)
