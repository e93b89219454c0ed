"""All mutants by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from tests.npu.mutants.failures import FAILURES
from tests.npu.mutants.mutant import Mutant
from tests.npu.mutants.operators import OPERATORS
from tests.npu.mutants.ranks import RANKS

MUTANTS: Mapping[str, Mutant] = MappingProxyType({mutant.name: mutant for mutant in (*OPERATORS, *RANKS, *FAILURES)})
