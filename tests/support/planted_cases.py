"""The suite's fixed cases against a backend with a planted bug, until a check fails."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Case
from polyaccel_conformance.check import RESTRICTION, run_case
from polyaccel_conformance.checks.registry import CHECKS
from polyaccel_conformance.problems.registry import PROBLEM_SETS
from polyaccel_conformance.schedule import fixed

MOST = 120
"""Cases of an operator."""


def is_from(package: ModuleType, folder: str) -> None:
    """The package that was imported is the folder's."""
    assert package.__file__ is not None
    own = Path(package.__file__).parent.parent
    assert own == Path(folder).resolve(), f"{own} was imported, not {folder}"


def first_failure(
    bench: Bench, operators: str, checks: str, most: int = MOST, asks: Callable[[Case], bool] = lambda case: True
) -> str:
    """One line of JSON: how many cases ran, and the first failure's check, cause and message, or empty ones;
    ``cannot`` says why a check cannot be asked here.

    Args:
        operators, checks: names with commas between them.
        asks: whether a case is run.
    """
    answer = {"check": "", "cause": "", "message": "", "cannot": ""}
    asked = [CHECKS[name] for name in checks.split(",")]
    answer["cannot"] = "; ".join(filter(None, (check.unavailable(bench) for check in asked)))
    count = 0
    for operator in operators.split(","):
        problems = PROBLEM_SETS[operator]
        for case in filter(asks, (scheduled.case for scheduled in fixed(problems)[:most])):
            count += 1
            for failure in run_case(bench, problems.problem(case), asked).failures:
                if not failure.cause.startswith(RESTRICTION) and not failure.not_promised:
                    answer |= {"check": failure.check, "cause": failure.cause, "message": failure.message[:300]}
                    return json.dumps({"cases": count, **answer})
    return json.dumps({"cases": count, **answer})
