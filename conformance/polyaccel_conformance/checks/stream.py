"""Whether work goes to the stream that the caller made current."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Case
from polyaccel_conformance.check import Check, Control, Failure
from polyaccel_conformance.harness.controls import linear_problem
from polyaccel_conformance.harness.devices import instruments
from polyaccel_conformance.harness.streams import late_call, stale_delay
from polyaccel_conformance.problem import Problem
from polyaccel_conformance.trial import Trial


class SideStream(Check):
    """Called under a side stream whose work is late, an operator gives the same bits, waiting for that stream alone.

    A launch into the default stream, or metadata that reaches the device some other way, meets operands that have not
    been written.
    """

    name = "stream.side"

    def unavailable(self, bench: Bench) -> str:
        return instruments(bench).lacks("streams")

    def applies(self, case: Case, problem: Problem) -> bool:
        return case.stream == "side"

    def run(self, trial: Trial) -> Failure | None:
        return self._ask(trial, misplaced=False)

    def _ask(self, trial: Trial, *, misplaced: bool) -> Failure | None:
        reference = trial.observe()
        delay = stale_delay(trial.bench)
        if reference.error is not None or delay is None:
            return None
        for name, output in late_call(trial, delay, misplaced=misplaced).items():
            wanted = reference.outputs[name].bits
            if wanted.shape != output.bits.shape or not np.array_equal(wanted, output.bits):
                return Failure(
                    check=self.name,
                    cause="stale data on a side stream",
                    message=f"{name} differs when operands arrive late on the stream that is current",
                    output=name,
                )
        return None

    def control(self, bench: Bench) -> Control:
        """A read without synchronisation must see stale data, and a call under the wrong stream must be noticed."""
        if stale_delay(bench) is None:
            return "did not fail"
        trial = Trial(bench, linear_problem())
        try:
            return "did not fail" if self._ask(trial, misplaced=True) is None else "failed as it must"
        finally:
            trial.close()


STREAM_CHECKS: Mapping[str, Check] = {check.name: check for check in (SideStream(),)}
