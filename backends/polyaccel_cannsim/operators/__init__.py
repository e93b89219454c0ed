"""The operator table: what each simulated `aclnn*` function accepts, refuses and computes.

A row is an `operator.Operator`: the C signature, the rule, the torch or torch_npu operators that end in it, and the
document that publishes it. A rule checks the documented constraints with the citation beside each, refuses with CANN's
codes what CANN refuses, and returns what computes the result on CPU views of the device's memory: in float32 or better,
rounded once to the output's type. What no row covers is not exported, so torch_npu itself names it as missing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..hccl.domains import domains_of
from ..registry import Rule
from . import (
    activation,
    attention,
    elementwise,
    filling,
    fused_collective,
    fused_quantised,
    grouped_matmul,
    indexing,
    kv_cache,
    matmul,
    norm,
    reduction,
    rotary,
    sorting,
)
from .environment import Environment
from .operator import Operator

if TYPE_CHECKING:
    from ..simulator import Simulator

__all__ = ["OPERATORS", "RULES", "environment_of"]

OPERATORS: tuple[Operator, ...] = tuple(
    row
    for module in (
        activation,
        attention,
        elementwise,
        filling,
        fused_collective,
        fused_quantised,
        grouped_matmul,
        indexing,
        kv_cache,
        matmul,
        norm,
        reduction,
        rotary,
        sorting,
    )
    for row in module.OPERATORS
)


def environment_of(simulator: Simulator) -> Environment:
    """The chip and the communicators of a simulated machine, the same object for all its calls."""
    found = simulator.communicators.get("environment")
    if found is None:
        found = Environment(simulator.settings.soc.chip.value, domains_of(simulator))
        simulator.communicators["environment"] = found
    assert isinstance(found, Environment)
    return found


RULES: tuple[Rule, ...] = tuple(rule for row in OPERATORS for rule in row.rules(environment_of))
