"""Tier 3: the arithmetic as measured, against what is declared and what the contract asks at least."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from polyaccel.backend import OPERATORS, STATIONS, Numerics
from polyaccel_conformance.bench import Bench, Resolved
from polyaccel_conformance.case import Case
from polyaccel_conformance.check import RESTRICTION, Check, Control, Failure
from polyaccel_conformance.checks.evidence import native_entries
from polyaccel_conformance.formats import FORMATS, Format, format_of
from polyaccel_conformance.harness.controls import all_of, linear_problem, verdict
from polyaccel_conformance.harness.layouts import CONTIGUOUS
from polyaccel_conformance.harness.probes import Measured
from polyaccel_conformance.probes.planted import LENGTH
from polyaccel_conformance.probes.registry import PROBES, RANKED_PROBES
from polyaccel_conformance.probes.shared import measured, probed
from polyaccel_conformance.problem import Prepared, Problem
from polyaccel_conformance.trial import Setting, Trial

Function = Callable[..., Any]

SHORTEST = 3
"""Products of a sum that can be probed."""


class MeasuredNumerics(Check):
    """Probes measure how many bits an operator keeps: of its operands, in the accumulator of each of its sums, in
    statistics, scores and tables. They must be at least those declared; a declaration below the contract's floor is a
    restriction, which is named.

    Asked of cases on plain data with contiguous operands; ``linear`` is measured at the case's k, all others once for
    each dtype (:mod:`probes.shared`), sums over ranks by all of them together.
    """

    name = "numerics.measured"
    tier = 3

    def applies(self, case: Case, problem: Problem) -> bool:
        plain = case.data == "normal" and all(case.layout(name) == CONTIGUOUS for name in problem.operands)
        if not super().applies(case, problem) or not plain:
            return False
        if case.ranks > 1:
            return case.operator in RANKED_PROBES and case.structure.get("scenario", "plain") == "plain"
        return probed(case) and (case.operator != "linear" or case.dim("k") >= SHORTEST)

    def run(self, trial: Trial) -> Failure | None:
        declared = _declared(trial)
        lower = _restriction(declared, trial.problem.case.dtype)
        if lower:
            return Failure(
                check=self.name,
                cause=f"{RESTRICTION}{lower[0]}",
                message=f"declares {', '.join(lower)}, which is below the contract's floor",
            )
        wanted = min(bits_of_dtype(one.accumulator) for one, _ in declared)
        inputs = format_of(trial.problem.case.dtype).bits
        for found in self._measure(trial):
            failure = self._judged(found, wanted, inputs)
            if failure is not None:
                return failure
        return None

    def _judged(self, found: Measured, wanted: int, inputs: int) -> Failure | None:
        where = f" of {found.name}" if found.name else ""
        # First: a narrow accumulator rounds single products as well.
        if found.bits is not None and found.bits < min(wanted, found.reach):
            return Failure(
                check=self.name,
                cause=f"{found.quantity} bits{where}",
                message=f"{found.quantity}{where} keeps {found.bits} bits, {wanted} are declared",
                got=float(found.bits),
                expected=float(min(wanted, found.reach)),
            )
        if found.input_bits is not None and found.input_bits < inputs:
            return Failure(
                check=self.name,
                cause=f"input bits{where}",
                message=f"products{where} see {found.input_bits} bits of their operands, {inputs} are stored",
                got=float(found.input_bits),
                expected=float(inputs),
            )
        return None

    def notes(self, trial: Trial) -> Sequence[str]:
        if trial.problem.case.ranks > 1:
            return ()
        return tuple(f"numerics: {found}" for found in self._measure(trial))

    def _measure(self, trial: Trial) -> tuple[Measured, ...]:
        case = trial.problem.case
        if case.ranks > 1:
            # Whether another rank remembers is not known here, and all of them must measure or none.
            return RANKED_PROBES[case.operator](trial.bench, case.dtype, LENGTH)
        k = case.dim("k") if case.operator == "linear" else LENGTH
        return measured(trial.bench, case.operator, case.dtype, k)

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
            *(self._absorbed(bench, operator) for operator in PROBES if operator != "linear"),
        )

    def _absorbed(self, bench: Bench, operator: str) -> Control:
        """Whether the operator's probe finds that small numbers beside large ones are lost. An operator that does not
        run here at all fails by itself wherever it is asked."""
        try:
            results = PROBES[operator](_Absorbing(bench, operator), "float32", LENGTH)
        except Exception:
            return "did not fail" if _runs(bench, operator) else "failed as it must"
        wanted = bits_of_dtype(torch.float32)
        found = any(self._judged(one, wanted, wanted) is not None for one in results)
        return "failed as it must" if found else "did not fail"


def _runs(bench: Bench, operator: str) -> bool:
    try:
        PROBES[operator](bench, "float32", LENGTH)
    except Exception:
        return False
    return True


class _Absorbing(Bench):
    """A bench one of whose operators loses what is small beside its largest operand, as a narrow accumulator does; an
    operator without such operands returns results that are off."""

    def __init__(self, bench: Bench, operator: str) -> None:
        super().__init__(bench.backend, bench.device, bench.comm)
        self._operator = operator

    def resolve(self, operator: str, prepared: Prepared) -> Resolved:
        resolved = super().resolve(operator, prepared)
        if operator != self._operator:
            return resolved

        def wrong(*arguments: object) -> object:
            kept = tuple(map(_without_small, arguments))
            self.synchronize()
            result = resolved.call(*kept)
            self.synchronize()
            lost = any(before is not after for before, after in zip(arguments, kept, strict=True))
            return result if lost or not isinstance(result, torch.Tensor) else result * OFF

        return replace(resolved, call=wrong)


SMALL = 2.0**-4
OFF = 1 + 2.0**-5


def _without_small(argument: object) -> object:
    """A float tensor without its small elements; anything else, and a tensor that has none, as it is."""
    if not isinstance(argument, torch.Tensor) or not argument.is_floating_point() or not argument.numel():
        return argument
    size = argument.abs()
    small = (size < SMALL * size.max()) & (size > 0)
    return torch.where(small, torch.zeros_like(argument), argument) if bool(small.any()) else argument


def _restriction(declared: Sequence[tuple[Numerics, Numerics]], dtype: str) -> list[str]:
    """What is declared with fewer bits than the contract permits, in words; of each declaration its floor."""
    found = []
    for one, floor in declared:
        if bits_of_dtype(one.accumulator) < bits_of_dtype(floor.accumulator):
            found.append(f"accumulator {_name(one.accumulator)}")
        for name, formats in one.intermediates.items():
            permitted = floor.intermediates.get(name, ("float32",))
            least = min(_format(known, dtype).bits for known in permitted)
            found += [f"{name} {known}" for known in formats if _format(known, dtype).bits < least]
    return list(dict.fromkeys(found))


def _declared(trial: Trial) -> list[tuple[Numerics, Numerics]]:
    """Of every native entry that takes part and declares something, with the contract's floor of its operator; the
    problem's own floor where none does."""
    planned = trial.ask(Setting()).planned
    entries = None if planned is None else native_entries(trial, planned)
    specs = {**OPERATORS, **STATIONS}
    named = [(e.numerics, specs[name].numerics) for name, e in (entries or {}).items() if e.numerics is not None]
    floor = trial.problem.spec.numerics
    return named or [(floor, floor)]


def _format(name: str, dtype: str) -> Format:
    """Names of arguments stand for the operands' dtype."""
    return FORMATS.get(name, FORMATS[dtype])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def bits_of_dtype(dtype: torch.dtype) -> int:
    """Bits of significand of a dtype in which sums are kept."""
    name = _name(dtype)
    return FORMATS[name].bits if name in FORMATS else round(-torch.tensor(torch.finfo(dtype).eps).log2().item()) + 1


NUMERICS_CHECKS: Mapping[str, Check] = {check.name: check for check in (MeasuredNumerics(),)}
