"""Tier 3: the arithmetic as measured, against what is declared and what the contract asks at least."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from polyaccel.backend import Numerics
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Case
from polyaccel_conformance.check import Check, Control, Failure
from polyaccel_conformance.checks.evidence import native_entries
from polyaccel_conformance.formats import FORMATS, format_of
from polyaccel_conformance.harness.controls import all_of, linear_problem, verdict
from polyaccel_conformance.harness.layouts import CONTIGUOUS
from polyaccel_conformance.harness.probes import ACCUMULATOR_BITS, Measured, measure
from polyaccel_conformance.problem import Problem
from polyaccel_conformance.trial import Setting, Trial

Function = Callable[..., Any]


class MeasuredNumerics(Check):
    """Probes measure how many bits inputs and accumulator of a product keep. They must be at least those declared; a
    declaration below the contract's floor is a restriction, which is named.

    Asked of cases of ``linear`` on plain data with a contiguous operand, at the case's k.
    """

    name = "numerics.measured"
    tier = 3

    def applies(self, case: Case, problem: Problem) -> bool:
        plain = case.data == "normal" and case.layout("x") == CONTIGUOUS
        if not super().applies(case, problem) or problem.spec.name != "linear" or not plain:
            return False
        return case.dim("k") >= 3 and case.stream == "default" and case.device == "current"

    def run(self, trial: Trial) -> Failure | None:
        floor = trial.problem.spec.numerics
        declared = _declared(trial, floor)
        wanted = bits_of_dtype(declared.accumulator)
        if wanted < bits_of_dtype(floor.accumulator):
            names = [str(dtype).removeprefix("torch.") for dtype in (declared.accumulator, floor.accumulator)]
            return Failure(
                check=self.name,
                cause=f"restriction: accumulator {names[0]}",
                message=f"declares an accumulator of {names[0]}; the contract asks for {names[1]}",
            )
        measured = self._measure(trial)
        inputs = format_of(trial.problem.case.dtype).bits
        # First: a narrow accumulator rounds single products as well.
        if measured.accumulator_bits < min(wanted, ACCUMULATOR_BITS):
            return Failure(
                check=self.name,
                cause="accumulator bits",
                message=f"sums keep {measured.accumulator_bits} bits, {wanted} are declared",
                got=float(measured.accumulator_bits),
                expected=float(wanted),
            )
        if measured.input_bits < inputs:
            return Failure(
                check=self.name,
                cause="input bits",
                message=f"products see {measured.input_bits} bits of their operands, {inputs} are stored",
                got=float(measured.input_bits),
                expected=float(inputs),
            )
        return None

    def notes(self, trial: Trial) -> Sequence[str]:
        return (f"numerics: {self._measure(trial)}",)

    def _measure(self, trial: Trial) -> Measured:
        return measure(trial.bench, trial.problem.case, trial.problem.case.dim("k"))

    def control(self, bench: Bench) -> Control:
        def few_input_bits(fn: Function) -> Function:
            return lambda x, weight: fn(x.bfloat16().to(x.dtype), weight)

        def few_accumulator_bits(fn: Function) -> Function:
            def wrong(x: torch.Tensor, weight: object) -> object:
                total = torch.zeros((), device=x.device)
                half = x.clone()
                half[:, x.shape[1] // 2 :] = 0
                for part in (half, x - half):
                    total = (total + fn(part, weight)).bfloat16().float()
                return total

            return wrong

        problem = linear_problem(layout=CONTIGUOUS)
        low = Numerics(accumulator=torch.bfloat16)
        return all_of(
            verdict(bench, self, problem, few_input_bits),
            verdict(bench, self, problem, few_accumulator_bits),
            verdict(bench, self, problem, lambda fn: fn, numerics=low),
        )


def _declared(trial: Trial, floor: Numerics) -> Numerics:
    planned = trial.ask(Setting()).planned
    entries = None if planned is None else native_entries(trial, planned)
    declared = [entry.numerics for entry in (entries or {}).values() if entry.numerics is not None]
    return declared[0] if declared else floor


def bits_of_dtype(dtype: torch.dtype) -> int:
    """Bits of significand of a dtype in which sums are kept."""
    name = str(dtype).removeprefix("torch.")
    return FORMATS[name].bits if name in FORMATS else round(-torch.tensor(torch.finfo(dtype).eps).log2().item()) + 1


NUMERICS_CHECKS: Mapping[str, Check] = {check.name: check for check in (MeasuredNumerics(),)}
