"""Whether an operand's strides are read as they are, and copies that they cost are counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from polyaccel.backend import OperatorError
from polyaccel.backend.ledger import COPY_PREFIX
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Case
from polyaccel_conformance.check import Check, Control, Failure
from polyaccel_conformance.compare import compare, excess, pattern
from polyaccel_conformance.harness.controls import all_of, linear_problem, verdict
from polyaccel_conformance.harness.layouts import CONTIGUOUS, promised
from polyaccel_conformance.harness.memory import Poison
from polyaccel_conformance.oracle.bounded import Expected
from polyaccel_conformance.problem import Problem
from polyaccel_conformance.trial import POISONED, Observation, Output, Setting, Trial

Function = Callable[..., Any]

DENSE = Setting(poison=Poison.NAN, contiguous=True)

MEASURED = 8
"""In one case of so many the call with contiguous operands is made to be measured, where it can hardly fail."""


class Arguments(Check):
    """The result is that for contiguous operands: bit by bit on exact data, and on others within the bound.

    The call with contiguous operands is made only where it can tell: a result that is right by itself is what that call
    gives, or as good. Copies of an operand that only its layout costs are counted as ``copy.<operator>.<argument>``.
    Conversions to another dtype are hardly ever for the layout's sake: in one case of :data:`MEASURED` it is asked
    whether they are. A layout that the contract does not make implementations accept may also be refused, by a typed
    error that names the argument.
    """

    name = "layout.arguments"

    def applies(self, case: Case, problem: Problem) -> bool:
        return super().applies(case, problem) and any(
            case.layout(name) != CONTIGUOUS and operand.values.size for name, operand in problem.operands.items()
        )

    def run(self, trial: Trial) -> Failure | None:
        observed = trial.observe(POISONED)
        if observed.error is not None:
            return self._refusal(trial, observed.error)
        if self._settled(trial, observed):
            return None
        dense = trial.ask(DENSE)
        return self._values(trial, observed, dense) or self._copies(trial, observed, dense)

    def notes(self, trial: Trial) -> Sequence[str]:
        if trial.observe(POISONED).error is not None or not _is_measured(trial.problem.case):
            return ()
        observed, dense = trial.ask(POISONED), trial.ask(DENSE)
        differs = any(not np.array_equal(o.bits, dense.outputs[n].bits) for n, o in observed.outputs.items())
        return ("layout: other bits, within the bound",) if differs else ()

    def _refusal(self, trial: Trial, error: Exception) -> Failure | None:
        case, spec = trial.problem.case, trial.problem.spec
        strange = [name for name in trial.problem.operands if not promised(spec.argument(name), case.layout(name))]
        if not strange or not isinstance(error, OperatorError):
            raise error
        if any(operand.name in strange for operand in error.operands) or any(name in error.reason for name in strange):
            return None
        return Failure(
            check=self.name,
            cause="refusal names no argument",
            message=f"{' and '.join(strange)} may be refused in this layout, but the error says: {error}",
        )

    def _settled(self, trial: Trial, observed: Observation) -> bool:
        """Whether every element is right, and every copy that its layout may cost is counted. Of an exact zero the data
        do not determine the sign."""
        for name, output in observed.outputs.items():
            expected = trial.expected.get(name)
            if isinstance(expected, Expected):
                if compare(expected, output.values, output.dtype) is not None:
                    return False
            elif expected is None or not _equal(expected.values, output):
                return False
        if observed.activity is None or observed.planned is None or observed.planned.composites():
            return True
        case, copies = trial.problem.case, dict(observed.activity.operand_copies)
        if not _is_measured(case):
            for name, count in observed.activity.conversions.items():
                copies[name] -= count
        return all(n <= _counted(observed, name) for name, n in copies.items() if case.layout(name) != CONTIGUOUS)

    def _values(self, trial: Trial, observed: Observation, dense: Observation) -> Failure | None:
        for name, output in observed.outputs.items():
            other = dense.outputs[name]
            if other.bits.shape != output.bits.shape:
                message = f"shape {output.bits.shape}, {other.bits.shape} for contiguous operands"
                return Failure(check=self.name, cause="shape depends on the layout", message=message, output=name)
            mask = np.asarray(output.bits != other.bits, dtype=np.bool_)
            expected = trial.expected.get(name)
            if mask.any() and isinstance(expected, Expected) and not expected.exact:
                # Kernels that start elsewhere in a vector add in another order.
                wrong = excess(expected, output.values.astype(np.float64)) > 1
                mask &= wrong & ~(excess(expected, other.values.astype(np.float64)) > 1)
            if mask.any():
                index = tuple(int(i) for i in np.argwhere(mask)[0])
                return Failure(
                    check=self.name,
                    cause="result depends on the layout",
                    message=f"{int(mask.sum())} of {mask.size} elements of {name} differ from those for contiguous "
                    f"operands, first {index}",
                    output=name,
                    index=index,
                    got=float(output.values[index]),
                    expected=float(other.values[index]),
                    pattern=pattern(mask),
                )
        return None

    def _copies(self, trial: Trial, observed: Observation, dense: Observation) -> Failure | None:
        if observed.activity is None or dense.activity is None:
            return None
        if observed.planned is None or observed.planned.composites():
            # A composite is counted as such, whatever torch does inside.
            return None
        for argument, count in observed.activity.operand_copies.items():
            extra = count - dense.activity.operand_copies.get(argument, 0)
            counted = _counted(observed, argument)
            if extra > counted:
                return Failure(
                    check=self.name,
                    cause=f"copies {argument!r} uncounted",
                    message=f"{extra} copies of {argument!r} were made for its layout, the ledger shows {counted} as "
                    f"{COPY_PREFIX}{trial.problem.case.operator}.{argument}",
                )
        return None

    def control(self, bench: Bench) -> Control:
        def flat(fn: Function) -> Function:
            def wrong(x: torch.Tensor, weight: object) -> torch.Tensor:
                y: torch.Tensor = fn(x.as_strided(x.shape, (x.shape[1], 1), x.storage_offset()), weight)
                return y

            return wrong

        def copies(fn: Function) -> Function:
            def wrong(x: torch.Tensor, weight: object) -> torch.Tensor:
                y: torch.Tensor = fn(x.contiguous(), weight)
                return y

            return wrong

        return all_of(*(verdict(bench, self, linear_problem(), wrap) for wrap in (flat, copies)))


def _is_measured(case: Case) -> bool:
    return not int(case.key, 16) % MEASURED


def _equal(wanted: object, output: Output) -> bool:
    """Whether an output is the one array that is right; a verdict by a function may accept several."""
    return isinstance(wanted, np.ndarray) and np.array_equal(wanted, output.values)


def _counted(observed: Observation, argument: str) -> int:
    """Copies of an argument that the ledger shows."""
    return sum(
        count
        for kernel, count in observed.ledger.items()
        if kernel.startswith(COPY_PREFIX) and kernel.rpartition(".")[2] == argument
    )


LAYOUT_CHECKS: Mapping[str, Check] = {check.name: check for check in (Arguments(),)}
