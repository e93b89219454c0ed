"""Whether operands may share memory where the contract lets them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Case
from polyaccel_conformance.check import Check, Control, Failure
from polyaccel_conformance.harness.controls import NormProblem, verdict
from polyaccel_conformance.problem import Problem
from polyaccel_conformance.trial import Setting, Trial

Function = Callable[..., Any]


def pairs(problem: Problem) -> list[tuple[str, str]]:
    """Arguments that may be the same view: both are inputs, or the contract allows it by name."""
    found = []
    for a, b in itertools.permutations(problem.operands, 2):
        one, other = problem.spec.argument(a), problem.spec.argument(b)
        inputs = a < b and not one.mutated and not other.mutated
        fits = problem.operands[a].shape == problem.operands[b].shape
        alike = problem.operands[a].dtype == problem.operands[b].dtype
        if (inputs or b in one.may_alias) and fits and alike and problem.operands[a].values.size:
            found.append((a, b))
    return found


class Allowed(Check):
    """The same view passed as two inputs gives the same bits as two copies of it."""

    name = "alias.allowed"

    def applies(self, case: Case, problem: Problem) -> bool:
        return super().applies(case, problem) and bool(pairs(problem))

    def run(self, trial: Trial) -> Failure | None:
        case = trial.problem.case
        for a, b in pairs(trial.problem):
            if case.layout(a) != case.layout(b):
                continue
            apart = trial.ask(Setting(equal=(a, b)))
            same = trial.ask(Setting(equal=(a, b), shared=True))
            for name, output in apart.outputs.items():
                other = same.outputs[name]
                if other.bits.shape == output.bits.shape and np.array_equal(other.bits, output.bits):
                    continue
                return Failure(
                    check=self.name,
                    cause=f"wrong where {a} is {b}",
                    message=f"{name} differs between {a} and {b} in the same memory and in two copies",
                    output=name,
                )
        return None

    def control(self, bench: Bench) -> Control:
        def wrap(fn: Function) -> Function:
            def in_place(x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor) -> object:
                residual.mul_(0.5)
                return fn(x, weight, eps, residual * 2)

            return in_place

        return verdict(bench, self, NormProblem(), wrap)


ALIAS_CHECKS: Mapping[str, Check] = {check.name: check for check in (Allowed(),)}
