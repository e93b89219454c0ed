"""What a probe measures once for all cases of an operator and dtype."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Case
from polyaccel_conformance.harness.layouts import CONTIGUOUS
from polyaccel_conformance.harness.probes import Measured
from polyaccel_conformance.probes.planted import LENGTH
from polyaccel_conformance.probes.registry import PROBES

Shared = tuple[str, str]
"""Operator and dtype."""


def probed(case: Case) -> bool:
    """Whether a case of one rank, as far as its operands are not known, is one to measure at."""
    here = case.stream == "default" and case.device == "current" and case.alias == "none"
    return here and case.data == "normal" and case.operator in PROBES


def shared_probe(case: Case) -> Shared | None:
    """What can be measured before this case and others; None where nothing is, or only for this one."""
    plain = all(case.layout(name) == CONTIGUOUS for name in case.layouts)
    if case.ranks > 1 or case.operator == "linear" or not plain or not probed(case):
        return None
    return case.operator, case.dtype


def measured(bench: Bench, operator: str, dtype: str, k: int = LENGTH) -> tuple[Measured, ...]:
    """What the operator's probe finds, asked once of a bench."""
    key = _key(operator, dtype, k)
    if key not in bench.memo:
        bench.memo[key] = PROBES[operator](bench, dtype, k)
    found = bench.memo[key]
    assert isinstance(found, tuple)
    return found


def remember(bench: Bench, case: Case, found: Sequence[Mapping[str, Any]]) -> None:
    """Take for measured what :func:`measure` found, on whichever worker."""
    shared = shared_probe(case)
    if shared is not None:
        bench.memo[_key(*shared, LENGTH)] = tuple(Measured(**one) for one in found)


def measure(bench: Bench, operator: str, dtype: str) -> list[dict[str, Any]]:
    """The measurement as JSON values."""
    return [asdict(found) for found in measured(bench, operator, dtype)]


def _key(operator: str, dtype: str, k: int) -> str:
    return f"numerics {operator} {dtype} {k}"
