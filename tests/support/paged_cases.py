"""The suite's cases of paged attention, as one dtype and head width, on a backend that plans steps for FlashInfer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Case
from polyaccel_conformance.checks.registry import CHECKS
from polyaccel_conformance.problems.registry import PROBLEM_SETS
from polyaccel_conformance.schedule import fixed
from polyaccel_conformance.trial import Trial

OPERATOR = "paged_attention"


def cases(dtype: str, head_dim: int, most: int) -> Sequence[Case]:
    """Those that FlashInfer takes whole: no padding, no window that cuts anything off."""
    found = (
        replace(item.case, dtype=dtype, dims={**item.case.dims, "head_dim": head_dim}, device="current")
        for item in fixed(PROBLEM_SETS[OPERATOR])
    )
    taken = [
        case
        for case in found
        if case.dims["sequences"] and case.structure["phase"] != "padded" and case.attributes["window"] in (None, 4096)
    ]
    return taken[:most]


def failures(bench: Bench, listed: Sequence[Case], checks: Sequence[str]) -> list[str]:
    """What the checks found."""
    found = []
    for case in listed:
        problem = PROBLEM_SETS[OPERATOR].problem(case)
        # Steps are planned for what the plan was asked before they began.
        bench.resolve(OPERATOR, problem.prepare(bench))
        trial = Trial(bench, problem)
        applied = [name for name in checks if CHECKS[name].applies(case, problem)]
        assert applied, case
        for name in applied:
            failure = CHECKS[name].run(trial)
            found += [] if failure is None else [f"{case}: {failure}"]
        trial.close()
    return found
