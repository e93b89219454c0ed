"""The suite's fixed cases against the CUDA backend of a folder, until a check fails.

``python -m tests.cuda_devices.mutants.on_gpu FOLDER OPERATOR,... CHECK,... [MOST]`` prints one line of JSON: how many
cases ran, and the first failure's check, cause and message, or empty ones; ``cannot`` says why a check cannot be asked
here. Without a GPU kernels run in Triton's interpreter.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

import polyaccel_cuda
from polyaccel.backend import Backend
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.check import RESTRICTION, run_case
from polyaccel_conformance.checks.registry import CHECKS
from polyaccel_conformance.problems.registry import PROBLEM_SETS
from polyaccel_conformance.schedule import fixed

DTYPES = ("float32", "float16")
"""Of a case that the interpreter runs: it multiplies bfloat16 as integers."""


def opened() -> Backend:
    if torch.cuda.is_available():
        from polyaccel_cuda.backend import CudaBackend

        return CudaBackend()
    from tests.backends.interpreted.backend import InterpretedBackend

    return InterpretedBackend()


def main(folder: str, operators: str, checks: str, most: str = "120") -> None:
    own = Path(polyaccel_cuda.__file__).parent.parent
    assert own == Path(folder).resolve(), f"{own} was imported, not {folder}"
    bench, answer = Bench(opened()), {"check": "", "cause": "", "message": "", "cannot": ""}
    asked = [CHECKS[name] for name in checks.split(",")]
    answer["cannot"] = "; ".join(filter(None, (check.unavailable(bench) for check in asked)))
    count = 0
    for operator in operators.split(",") if not answer["cannot"] else ():
        problems = PROBLEM_SETS[operator]
        for scheduled in fixed(problems)[: int(most)]:
            if not torch.cuda.is_available() and scheduled.case.axes()["dtype"] not in DTYPES:
                continue
            count += 1
            for failure in run_case(bench, problems.problem(scheduled.case), asked).failures:
                if not failure.cause.startswith(RESTRICTION) and not failure.not_promised:
                    answer |= {"check": failure.check, "cause": failure.cause, "message": failure.message[:300]}
                    print(json.dumps({"cases": count, **answer}))
                    return
    print(json.dumps({"cases": count, **answer}))


if __name__ == "__main__":
    main(*sys.argv[1:])
