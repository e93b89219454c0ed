"""The suite's fixed cases against the package of a folder, until a check fails.

``python -m tests.npu.mutants.on_card FOLDER OPERATOR,... CHECK,...`` prints one line of JSON: how many cases ran, and
the first failure's check, cause and message, or empty ones.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import polyaccel_npu
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.check import RESTRICTION, run_case
from polyaccel_conformance.checks.registry import CHECKS
from polyaccel_conformance.problems.registry import PROBLEM_SETS
from polyaccel_conformance.schedule import fixed
from polyaccel_npu.backend import NpuBackend

MOST = 120
"""Cases of an operator."""


def main(folder: str, operators: str, checks: str) -> None:
    own = Path(polyaccel_npu.__file__).parent.parent
    assert own == Path(folder).resolve(), f"{own} was imported, not {folder}"
    bench = Bench(NpuBackend())
    asked = [CHECKS[name] for name in checks.split(",")]
    count = 0
    for operator in operators.split(","):
        problems = PROBLEM_SETS[operator]
        for scheduled in fixed(problems)[:MOST]:
            count += 1
            result = run_case(bench, problems.problem(scheduled.case), asked)
            for failure in result.failures:
                if not failure.cause.startswith(RESTRICTION) and not failure.not_promised:
                    found = {"check": failure.check, "cause": failure.cause, "message": failure.message[:300]}
                    print(json.dumps({"cases": count, **found}))
                    return
    print(json.dumps({"cases": count, "check": "", "cause": "", "message": ""}))


if __name__ == "__main__":
    main(*sys.argv[1:])
