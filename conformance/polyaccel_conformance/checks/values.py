"""Whether the numbers are right: bit by bit where the data determine them, within the oracle's bound elsewhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
import torch

from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Case
from polyaccel_conformance.check import Check, Control, Failure
from polyaccel_conformance.compare import Disagreement, compare
from polyaccel_conformance.problem import Exactly, Problem
from polyaccel_conformance.trial import Trial

Array = npt.NDArray[np.generic]


class _Values(Check):
    """Compares the outputs of one observation with what is expected."""

    exact: bool

    def applies(self, case: Case, problem: Problem) -> bool:
        return problem.arithmetic and problem.exact is self.exact

    def run(self, trial: Trial) -> Failure | None:
        observation = trial.ask()
        for name, expected in trial.expected.items():
            output = observation.outputs.get(name)
            if output is None:
                return Failure(check=self.name, cause="no output", message=f"{name} was not returned", output=name)
            if isinstance(expected, Exactly):
                found = _discrete(expected, output.values, output.dtype)
            else:
                found = compare(expected, output.values, output.dtype)
            if found is not None:
                return Failure(check=self.name, output=name, **dataclasses.asdict(found))
        return None

    def control(self, bench: Bench) -> Control:
        """The comparison itself is pure and has tests; on a device it is its own control through a changed element."""
        from polyaccel_conformance.harness.controls import wrong_values

        return wrong_values(bench, self)


class ExactValues(_Values):
    """Tier 1: integers, permutations and selections, where every right implementation gives the same bits."""

    name = "values.exact"
    tier = 1
    exact = True


class BoundedValues(_Values):
    """Tier 2: random data, |error| at most the bound that the oracle derives."""

    name = "values.bound"
    tier = 2
    exact = False


def _discrete(expected: Exactly, values: Array, dtype: torch.dtype) -> Disagreement | None:
    if expected.dtype not in (None, dtype):
        return Disagreement(cause="dtype", message=f"dtype {dtype}, expected {expected.dtype}")
    if isinstance(expected.values, Callable):  # type: ignore[arg-type]
        reason = expected.values(values)  # type: ignore[operator]
        return None if reason is None else Disagreement(cause="wrong choice", message=str(reason))
    wanted = np.asarray(expected.values)
    if wanted.shape != values.shape:
        return Disagreement(cause="shape", message=f"shape {values.shape}, expected {wanted.shape}")
    wrong = np.argwhere(wanted != values)
    if not len(wrong):
        return None
    index = tuple(int(i) for i in wrong[0])
    return Disagreement(
        cause="wrong choice",
        message=f"{len(wrong)} of {values.size} differ; at {index} {values[index]} instead of {wanted[index]}",
        index=index,
        got=float(values[index]),
        expected=float(wanted[index]),
    )


VALUE_CHECKS: Mapping[str, Check] = {check.name: check for check in (ExactValues(), BoundedValues())}
