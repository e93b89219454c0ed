"""Whether an infinity or NaN in an operand goes where the contract says, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from polyaccel.backend import NonFinite
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Case
from polyaccel_conformance.check import Check, Control, Failure
from polyaccel_conformance.compare import pattern
from polyaccel_conformance.harness.controls import all_of, linear_problem, verdict
from polyaccel_conformance.harness.layouts import CONTIGUOUS
from polyaccel_conformance.operand import Operand
from polyaccel_conformance.oracle.bounded import Expected
from polyaccel_conformance.problem import Problem
from polyaccel_conformance.trial import Trial

TURNS = 6
Function = Callable[..., Any]
Mask = npt.NDArray[np.bool_]


def planted(problem: Problem, argument: str, value: float) -> Problem:
    """The same problem with one element of an operand replaced."""
    operand = problem.operands[argument]
    values = operand.values.astype(np.float64)
    place = int(problem.source.integers(f"non-finite {argument}", (1,), 0, values.size - 1)[0])
    values.reshape(-1)[place] = value
    other = problem.beside()
    other.operands = {**problem.operands, argument: Operand(values, operand.dtype)}
    return other


class Rules(Check):
    """By the rule of each operand: NaN and infinity reach every output they contribute to, by IEEE arithmetic, and no
    other. Which these are, the oracle says. Asked of cases whose operands are all contiguous, a sixth of the pairs of
    operand and value in turn."""

    name = "nonfinite.rules"

    def applies(self, case: Case, problem: Problem) -> bool:
        plain = all(case.layout(name) == CONTIGUOUS for name in problem.operands) and case.alias == "none"
        return super().applies(case, problem) and plain and not problem.exact and bool(_ruled(problem))

    def run(self, trial: Trial) -> Failure | None:
        clean = trial.expected
        if not all(isinstance(e, Expected) and np.isfinite(e.value).all() for e in clean.values()):
            # What is chosen among numbers that cannot be compared is nobody's rule.
            return None
        if _weighs_with_zero(trial):
            # An adapter of mix weight 0 may be left out, or its infinity be multiplied by 0.
            return None
        for i, argument in enumerate(_ruled(trial.problem)):
            for j, value in enumerate((np.nan, np.inf)):
                if not trial.asks(2 * i + j, TURNS):
                    continue
                problem = planted(trial.problem, argument, value)
                with np.errstate(all="ignore"):
                    wanted = problem.expected()
                other = trial.beside(problem)
                try:
                    observed = other.ask()
                finally:
                    other.close()
                for name, output in observed.outputs.items():
                    expected, before = wanted.get(name), clean.get(name)
                    if not isinstance(expected, Expected) or not isinstance(before, Expected):
                        continue
                    if output.values.shape != expected.value.shape:
                        continue
                    found = self._judge(expected, before, output.values.astype(np.float64))
                    if found is not None:
                        cause, mask = found
                        index = tuple(int(i) for i in np.argwhere(mask)[0])
                        return Failure(
                            check=self.name,
                            cause=f"{value} in {argument!r}: {cause}",
                            message=f"{int(mask.sum())} of {mask.size} elements of {name}, first {index}",
                            output=name,
                            index=index,
                            got=float(output.values[index]),
                            expected=float(expected.value[index]),
                            pattern=pattern(mask),
                        )
        return None

    def _judge(self, expected: Expected, before: Expected, got: npt.NDArray[np.float64]) -> tuple[str, Mask] | None:
        reached = ~np.isfinite(expected.value)
        lost: Mask = (np.isnan(expected.value) & ~np.isnan(got)) | (reached & np.isfinite(got))
        if lost.any():
            return "does not propagate", lost
        with np.errstate(invalid="ignore"):
            elsewhere = ~reached & np.isfinite(expected.value) & (np.abs(before.value) < before.format.max / 2)
            spread: Mask = elsewhere & ~np.isfinite(got)
        return ("spreads", spread) if spread.any() else None

    def control(self, bench: Bench) -> Control:
        def swallows(fn: Function) -> Function:
            return lambda x, weight: torch.nan_to_num(fn(x, weight), posinf=1.0, neginf=1.0)

        def spreads(fn: Function) -> Function:
            def wrong(x: torch.Tensor, weight: object) -> object:
                y = fn(x, weight)
                return y + 0 * y.sum()

            return wrong

        problem = linear_problem(layout=CONTIGUOUS)
        return all_of(*(verdict(bench, self, problem, wrap) for wrap in (swallows, spreads)))


def _weighs_with_zero(trial: Trial) -> bool:
    inputs = trial.posed().inputs
    return inputs is not None and any((rows.weights == 0).any() for rows in inputs.adapters.values())


def _ruled(problem: Problem) -> list[str]:
    """Operands of which the contract says that non-finite values propagate, and that hold none yet."""
    return [
        name
        for name, operand in problem.operands.items()
        if problem.spec.argument(name).non_finite is NonFinite.PROPAGATES
        and np.issubdtype(operand.values.dtype, np.floating)
        and operand.values.size
        and np.isfinite(operand.values).all()
    ]


NON_FINITE_CHECKS: Mapping[str, Check] = {check.name: check for check in (Rules(),)}
