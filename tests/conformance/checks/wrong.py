"""Deliberately wrong operators on the CPU, and which checks find them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from polyaccel.backend import Entry, TableBackend
from polyaccel.backend.composite.linear import EVIDENCE, linear
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.check import Check, run_case
from polyaccel_conformance.checks.alias import ALIAS_CHECKS
from polyaccel_conformance.checks.evidence import EVIDENCE_CHECKS
from polyaccel_conformance.checks.invariance import INVARIANCE_CHECKS
from polyaccel_conformance.checks.layout import LAYOUT_CHECKS
from polyaccel_conformance.checks.lora_evidence import LORA_EVIDENCE_CHECKS
from polyaccel_conformance.checks.memory import MEMORY_CHECKS
from polyaccel_conformance.checks.nonfinite import NON_FINITE_CHECKS
from polyaccel_conformance.checks.numerics import NUMERICS_CHECKS
from polyaccel_conformance.checks.support import SUPPORT_CHECKS
from polyaccel_conformance.checks.values import VALUE_CHECKS
from polyaccel_conformance.harness.controls import linear_problem
from polyaccel_conformance.problem import Problem

Function = Callable[..., Any]

EVERY: tuple[Check, ...] = tuple(
    {
        **VALUE_CHECKS,
        **MEMORY_CHECKS,
        **LAYOUT_CHECKS,
        **ALIAS_CHECKS,
        **EVIDENCE_CHECKS,
        **INVARIANCE_CHECKS,
        **NUMERICS_CHECKS,
        **NON_FINITE_CHECKS,
        **LORA_EVIDENCE_CHECKS,
        **SUPPORT_CHECKS,
    }.values()
)
"""What is asked of one device."""


def bench_of(fn: Function, operator: str = "linear", **changes: Any) -> Bench:
    """A table with one native operator; ``linear`` declares the evidence of the plain-torch form."""
    evidence = changes.pop("evidence", EVIDENCE.get(operator, ()))
    return Bench(TableBackend("cpu", {operator: Entry(fn, evidence=evidence, **changes)}))


def around(before: Callable[[torch.Tensor], object]) -> Function:
    """``linear`` that does something with x first."""

    def wrong(x: torch.Tensor, weight: Any) -> torch.Tensor:
        before(x)
        return linear(x, weight)

    return wrong


def failing(bench: Bench, problem: Problem | None = None, checks: Sequence[Check] = EVERY) -> dict[str, str]:
    """Names of the checks that fail, with their causes."""
    result = run_case(bench, problem if problem is not None else linear_problem(), checks)
    return {failure.check: failure.cause for failure in result.failures}
