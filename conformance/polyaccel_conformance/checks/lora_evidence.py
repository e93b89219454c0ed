"""Founding case: the SGMV kernel silently not used. Every rank, module and cut must run on it, seen from outside."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from polyaccel.backend import Entry, Planned, Query
from polyaccel.backend.support import Static
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Case
from polyaccel_conformance.check import Check, Control, Failure
from polyaccel_conformance.checks.evidence import Native
from polyaccel_conformance.harness.controls import all_of, wrong_bench
from polyaccel_conformance.harness.kernels import launches_unseen
from polyaccel_conformance.harness.overlay import Overlay
from polyaccel_conformance.problem import Problem
from polyaccel_conformance.trial import POISONED, Posed, Trial

Function = Callable[..., Any]

OPERATOR = "sgmv"
LARGEST_RANK = 128
WORLD_SIZES = (2, 4)


class NativeLora(Check):
    """A backend that has ``sgmv`` plans it as native for every rank up to 128, slices narrower than the rank and the
    shares of 2 and 4 ranks included, and the evidence of the call shows that it ran."""

    name = "lora.native_evidence"

    def applies(self, case: Case, problem: Problem) -> bool:
        if not super().applies(case, problem) or problem.spec.name != OPERATOR:
            return False
        return case.dim("rank") <= LARGEST_RANK

    def run(self, trial: Trial) -> Failure | None:
        if OPERATOR not in trial.bench.table:
            return None
        observation = trial.ask(POISONED)
        planned = observation.planned
        assert planned is not None
        composites = planned.composites()
        if composites:
            return self._composite(trial, composites[0])
        found = Native().run(trial)
        if found is not None:
            return replace(found, check=self.name)
        activity = observation.activity
        unseen = launches_unseen(trial.bench.torch_device)
        if observation.changed and activity is not None and not activity.operators and not unseen:
            message = "y changed though no operator that computes was executed"
            return Failure(check=self.name, cause="no evidence", message=message)
        return self._cuts(trial)

    def _composite(self, trial: Trial, planned: Planned) -> Failure:
        rank = trial.problem.case.dim("rank")
        reasons = "; ".join(planned.reasons)
        return Failure(
            check=self.name,
            cause="planned as a composite",
            message=f"{planned.operator} of rank {rank} is refused: {reasons}",
        )

    def _cuts(self, trial: Trial) -> Failure | None:
        """The shares of 2 and 4 ranks, asked of ``supports`` only."""
        entries = trial.bench.table[OPERATOR]
        for what, query in _shares(trial.posed()):
            reasons = [entry.supports(query) for entry in entries]
            if all(reasons):
                message = f"{what} is refused: {'; '.join(r for refused in reasons for r in refused)}"
                return Failure(check=self.name, cause="a share is refused", message=message)
        return None

    def control(self, bench: Bench) -> Control:
        problem = _small()

        def refuses(query: Query) -> list[str]:
            rank = query.integer("largest_rank")
            return [f"the rank is {rank}, no multiple of 16"] if rank % 16 else []

        def falls_back(fn: Function) -> Function:
            composite = bench.backend.composites()[OPERATOR]

            def wrong(*args: Any) -> object:
                bench.synchronize()
                return composite(*args)

            return wrong

        fallen = wrong_bench(bench, problem, falls_back)
        refusing = Overlay(bench.backend, {OPERATOR: Entry(torch.add, supports=refuses)})
        return all_of(*(self._verdict(b, problem) for b in (fallen, Bench(refusing, bench.device, bench.comm))))

    def _verdict(self, bench: Bench, problem: Problem) -> Control:
        trial = Trial(bench, problem)
        try:
            return "did not fail" if self.run(trial) is None else "failed as it must"
        finally:
            trial.close()


def _shares(posed: Posed) -> Iterator[tuple[str, Query]]:
    """Queries of one rank's share, of a module cut by rows of its output and of one cut by columns of its input."""
    static = posed.static
    k, slices = static.get("k"), static.get("slices")
    assert isinstance(k, int)
    assert isinstance(slices, tuple)
    for size in WORLD_SIZES:
        cuts: Mapping[str, Mapping[str, Static]] = {
            f"a share of 1 / {size} of the output": {"slices": tuple(-(-n // size) for n in slices)},
            f"a share of 1 / {size} of the input": {"k": -(-k // size)},
        }
        for what, change in cuts.items():
            yield what, replace(posed.query(OPERATOR), adapters=True, static={**static, **change, "world_size": size})


def _small() -> Problem:
    from polyaccel_conformance.problems.sgmv import SgmvProblems

    problems = SgmvProblems()
    axes = {path: values[0] for path, values in problems.axes().items()}
    mended = problems.mend({**axes, "dims.tokens": 3, "dims.rank": 8})
    assert mended is not None
    return problems.problem(Case.of(OPERATOR, mended, 20_260_103))


LORA_EVIDENCE_CHECKS: Mapping[str, Check] = {check.name: check for check in (NativeLora(),)}
