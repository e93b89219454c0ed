"""Whether the planned implementation is what runs: asked of torch's dispatcher and the profiler, not of the backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from polyaccel.backend import Entry, Planned, TableBackend
from polyaccel.backend.ledger import NESTED_PREFIX
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Case
from polyaccel_conformance.check import Check, Control, Failure
from polyaccel_conformance.harness.controls import all_of, linear_problem, verdict
from polyaccel_conformance.harness.evidence import undeclared
from polyaccel_conformance.harness.kernels import KernelTrace, has_profiler, launches_unseen, undeclared_kernels
from polyaccel_conformance.problem import Problem
from polyaccel_conformance.trial import POISONED, Observation, Setting, Trial

Function = Callable[..., Any]

NOT_DECLARED = "evidence not declared"
VIEWS = frozenset({"dequantize"})
"""Operators that may return storage of the backend as it is."""


def native_entries(trial: Trial, planned: Planned) -> dict[str, Entry] | None:
    """The entries behind a plan's answer, by operator or station; None where some part of it is a composite."""
    if planned.kind == "parts":
        found: dict[str, Entry] = {}
        for part in planned.parts:
            entries = native_entries(trial, part)
            if entries is None:
                return None
            found |= entries
        return found
    if planned.kind == "composite":
        return None
    name = trial.bench.backend.name
    for entry in trial.bench.table.get(planned.operator, ()):
        if planned.implementation == (entry.name or f"{name}.{planned.operator}"):
            return {planned.operator: entry}
    return None


class Native(Check):
    """A native call executes what its entry declares as evidence and nothing else that computes; it copies nothing to
    another device, makes nobody wait, enters no composite, and does something.

    An entry that declares no evidence fails, for its calls prove nothing. Bare callables of a table are let off: they
    may be other people's kernels; the result then notes ``evidence not declared``.
    """

    name = "evidence.native"

    def run(self, trial: Trial) -> Failure | None:
        observation = trial.ask(POISONED)
        planned = observation.planned
        entries = None if planned is None else native_entries(trial, planned)
        if entries is None:
            return None
        return self._missing(trial, entries) or self._seen(trial, observation, entries)

    def notes(self, trial: Trial) -> Sequence[str]:
        planned = trial.ask(POISONED).planned
        entries = None if planned is None else native_entries(trial, planned)
        return [f"{NOT_DECLARED}: {name}" for name, entry in (entries or {}).items() if not entry.evidence]

    def _missing(self, trial: Trial, entries: Mapping[str, Entry]) -> Failure | None:
        silent = [name for name, entry in entries.items() if not entry.evidence]
        if not silent or isinstance(trial.bench.backend, TableBackend):
            return None
        return Failure(
            check=self.name,
            cause="undeclared",
            message=f"the entry of {', '.join(silent)} declares no evidence: nothing shows from outside that it ran",
        )

    def _seen(self, trial: Trial, observation: Observation, entries: Mapping[str, Entry]) -> Failure | None:
        activity = observation.activity
        assert activity is not None
        nested = [kernel for kernel in observation.ledger if kernel.startswith(NESTED_PREFIX)]
        if nested:
            return self._failure("nested composite", f"called {', '.join(nested)} inside a native implementation")
        if activity.crossings:
            return self._failure("copy to another device", f"copied operands: {', '.join(activity.crossings)}")
        if activity.reads:
            return self._failure(
                "host synchronisation", f"made the host wait by {', '.join(dict.fromkeys(activity.reads))}"
            )
        if all(entry.evidence for entry in entries.values()):
            declared = [name for entry in entries.values() for name in entry.evidence]
            strange = undeclared(activity, declared)
            if strange:
                return self._failure(
                    "undeclared operators", f"executed {', '.join(strange)}, which the entry does not declare"
                )
        appeared = observation.fresh and trial.problem.spec.name not in VIEWS
        # Where the profiler alone sees some kernels, evidence.kernels asks.
        silent = not activity.dispatched and not launches_unseen(trial.bench.torch_device)
        if silent and (appeared or observation.changed):
            return self._failure("no device activity", "results appeared though nothing was dispatched or allocated")
        return None

    def _failure(self, cause: str, message: str) -> Failure:
        return Failure(check=self.name, cause=cause, message=message)

    def control(self, bench: Bench) -> Control:
        problem = linear_problem()
        elsewhere = torch.device("meta" if bench.torch_device.type == "cpu" else "cpu")
        none = ("conformance::declared",)
        cached = torch.zeros(5, 8, device=bench.torch_device)

        def crosses(fn: Function) -> Function:
            def wrong(x: torch.Tensor, weight: object) -> object:
                x.to(elsewhere)
                return fn(x, weight)

            return wrong

        def waits(fn: Function) -> Function:
            def wrong(x: torch.Tensor, weight: object) -> object:
                x[0, 0].item()
                return fn(x, weight)

            return wrong

        def strange(fn: Function) -> Function:
            def wrong(x: torch.Tensor, weight: object) -> object:
                x.cos()
                return fn(x, weight)

            return wrong

        def idle(fn: Function) -> Function:
            def wrong(x: torch.Tensor, weight: object) -> object:
                return cached

            return wrong

        found = [
            verdict(bench, self, problem, crosses),
            verdict(bench, self, problem, waits),
            verdict(bench, self, problem, strange, evidence=none),
            _silent(bench, self, problem),
        ]
        if not launches_unseen(bench.torch_device):
            found.append(verdict(bench, self, problem, idle, evidence=none))
        return all_of(*found)


def _silent(bench: Bench, check: Check, problem: Problem) -> Control:
    return verdict(bench, check, problem, lambda fn: fn, evidence=())


class Kernels(Check):
    """On a device whose kernels torch's profiler sees: every kernel of a native call matches a declared name, and
    there is at least one. Asked of one case in sixteen, for a trace takes milliseconds."""

    name = "evidence.kernels"

    def applies(self, case: Case, problem: Problem) -> bool:
        return super().applies(case, problem) and int(case.key, 16) % 16 == 0

    def run(self, trial: Trial) -> Failure | None:
        if not has_profiler(trial.bench.torch_device):
            return None
        traces: list[KernelTrace] = []

        def around(bench: Bench) -> KernelTrace:
            bench.synchronize()
            traces.append(KernelTrace(bench.torch_device))
            return traces[0]

        observation = trial.ask(Setting(around=around))
        entries = None if observation.planned is None else native_entries(trial, observation.planned)
        if entries is None or not traces:
            return None
        kernels = traces[0].kernels
        appeared = observation.fresh and trial.problem.spec.name not in VIEWS
        if not kernels and (appeared or observation.changed):
            return Failure(check=self.name, cause="no kernel", message="the device ran no kernel during the call")
        declared = [name for entry in entries.values() for name in entry.evidence]
        if any("::" in name for name in declared) or not declared:
            # Operators of torch run kernels whose names torch does not promise.
            return None
        strange = undeclared_kernels(kernels, declared)
        if strange:
            message = f"the device ran {', '.join(strange)}, which the entry does not declare"
            return Failure(check=self.name, cause="undeclared kernels", message=message)
        return None

    def control(self, bench: Bench) -> Control:
        if not has_profiler(bench.torch_device):
            return "impossible here"
        cached = torch.zeros(5, 8, device=bench.torch_device)

        def idle(fn: Function) -> Function:
            return lambda x, weight: cached

        def strange(fn: Function) -> Function:
            return fn

        return all_of(
            verdict(bench, self, linear_problem(), idle),
            verdict(bench, self, linear_problem(), strange, evidence=("conformance_declared",)),
        )


EVIDENCE_CHECKS: Mapping[str, Check] = {check.name: check for check in (Native(), Kernels())}
