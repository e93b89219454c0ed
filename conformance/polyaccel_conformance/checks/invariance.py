"""Whether a result depends on what it may not depend on: the run, and the other rows of the batch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Case
from polyaccel_conformance.check import Check, Control, Failure
from polyaccel_conformance.harness.controls import linear_problem, verdict
from polyaccel_conformance.problem import Problem
from polyaccel_conformance.trial import POISONED, Observation, Setting, Trial, by_token

Function = Callable[..., Any]

TURNS = 2
REPEATS = (1, 2, 3)
"""Further calls with the same data, once a difference is to be explained."""


def _differing(one: Observation, other: Observation) -> list[str]:
    """Names of the outputs whose bits differ."""
    return [name for name, output in one.outputs.items() if not np.array_equal(output.bits, other.outputs[name].bits)]


class RunToRun(Check):
    """The same call on the same data gives the same bits again."""

    name = "invariance.run_to_run"
    tier = 3

    def run(self, trial: Trial) -> Failure | None:
        first = trial.ask()
        # The calls with poison are calls with the same data: where they agree, nothing depends on the run.
        others = [trial.ask(setting) for setting in trial.poisoned()]
        if not any(_differing(first, other) for other in others):
            return None
        # Several times: what happens in every third call may happen in none of two.
        for setting, repeat in itertools.product((Setting(), POISONED), REPEATS):
            for name in _differing(trial.ask(setting), trial.ask(replace(setting, repeat=repeat))):
                return Failure(
                    check=self.name,
                    cause="not deterministic",
                    message=f"{name} differs between two calls with the same data",
                    output=name,
                )
        return None

    def control(self, bench: Bench) -> Control:
        calls = iter(range(1000))

        def wrap(fn: Function) -> Function:
            def counts(x: torch.Tensor, weight: object) -> object:
                return fn(x, weight) + float(next(calls))

            return counts

        return verdict(bench, self, linear_problem(), wrap)


class Batch(Check):
    """A row alone gives the same bits as in its batch.

    A failure only where the contract promises it (the row's result then depends on nothing but that row), or where the
    backend has (``batch_invariant``); elsewhere it is measured and noted. Operators whose rows meet in a step bring the
    lone row themselves (``Problem.alone``); these are asked in one case of two, in turn.
    """

    name = "invariance.batch"
    tier = 3

    def applies(self, case: Case, problem: Problem) -> bool:
        if not super().applies(case, problem):
            return False
        if len(problem.apart) > 1:
            # A second call in a step of its own: once for each kind of case is enough.
            return case.device == "current" and case.stream == "default"
        rows = [len(o.values) for n, o in problem.operands.items() if by_token(problem.spec.argument(n).shape)]
        return problem.spec.name in ROW_BY_ROW and bool(rows) and min(rows) > 1

    def run(self, trial: Trial) -> Failure | None:
        differing = self._differing(trial) if self._asks(trial) else []
        if not differing or not self._promised(trial):
            return None
        return Failure(
            check=self.name,
            cause="depends on the batch",
            message=f"{', '.join(differing)} of a row alone differ from those of the row in its batch",
            output=differing[0],
        )

    def notes(self, trial: Trial) -> Sequence[str]:
        if self._promised(trial) or not self._asks(trial):
            return ()
        return ("batch: not invariant",) if self._differing(trial) else ("batch: invariant",)

    def _asks(self, trial: Trial) -> bool:
        return len(trial.problem.apart) < 2 or trial.asks(1, TURNS)

    def _promised(self, trial: Trial) -> bool:
        return promised_by_row(trial.problem) or trial.bench.backend.batch_invariant

    def _differing(self, trial: Trial) -> list[str]:
        """Found once, for the verdict and the notes."""
        if self.name not in trial.kept:
            trial.kept[self.name] = self._compared(trial)
        return trial.kept[self.name]

    def _compared(self, trial: Trial) -> list[str]:
        together = trial.ask()
        row = self._row(trial.problem)
        alone = self._alone(trial, row)
        found = []
        for name, output in together.outputs.items():
            other = alone.outputs.get(name)
            if other is None or not output.bits.ndim or other.bits.shape[1:] != output.bits.shape[1:]:
                continue
            # Of an exact zero the data do not determine the sign.
            same = trial.problem.exact and np.array_equal(other.values[0], output.values[row], equal_nan=True)
            if not same and not np.array_equal(other.bits[0], output.bits[row]):
                found.append(name)
        return found

    def _row(self, problem: Problem) -> int:
        if problem.apart:
            chosen = int(problem.source.integers("row alone", (1,), 0, len(problem.apart) - 1)[0])
            return problem.apart[chosen]
        rows = [len(o.values) for n, o in problem.operands.items() if by_token(problem.spec.argument(n).shape)]
        return int(problem.source.integers("row alone", (1,), 0, max(min(rows, default=1) - 1, 0))[0])

    def _alone(self, trial: Trial, row: int) -> Observation:
        problem = trial.problem.alone(row)
        if problem is None:
            return trial.ask(Setting(row=row))
        other = Trial(trial.bench, problem)
        try:
            return other.ask()
        finally:
            other.close()

    def control(self, bench: Bench) -> Control:
        def wrap(fn: Function) -> Function:
            def scaled(x: torch.Tensor, weight: object) -> object:
                return fn(x, weight) * (1 if len(x) == 1 else 2)

            return scaled

        return verdict(bench, _Promised(), linear_problem(), wrap)


class _Promised(Batch):
    """The same question of an operator that promises nothing, as if it did."""

    def run(self, trial: Trial) -> Failure | None:
        differing = self._differing(trial)
        return Failure(check=self.name, cause="depends on the batch", message="") if differing else None


ROW_BY_ROW = frozenset({"linear", "rms_norm", "layer_norm", "silu_and_mul", "gelu", "moe_route"})
"""Operators that compute every row from that row of each operand, so that one can be cut out."""

PROMISED_BY_ROW = frozenset({"sample", "moe_route", "select_rows"})
"""Operators whose contract defines a row's bits by that row alone: lookups and choices. Exact data always do."""


def promised_by_row(problem: Problem) -> bool:
    return problem.spec.name in PROMISED_BY_ROW or problem.exact is True


INVARIANCE_CHECKS: Mapping[str, Check] = {check.name: check for check in (RunToRun(), Batch())}
