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
from polyaccel_conformance.mutants.mutant import Mutant
from polyaccel_conformance.mutants.sequences import SEQUENCES

MUTANTS: Mapping[str, Mutant] = MappingProxyType(
    {mutant.name: mutant for mutant in (*ARITHMETIC, *SEQUENCES, *ADAPTERS, *CHOICES, *CONDUCT)}
)


def apply_mutant(name: str, backend: Backend) -> Backend:
    """The backend with a planted bug.

    Raises:
        UsageError: no such mutant.
    """
    if name not in MUTANTS:
        raise UsageError(f"no mutant {name!r}; there are {', '.join(MUTANTS)}")
    return MUTANTS[name].apply(backend)
