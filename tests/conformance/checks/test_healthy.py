"""Right backends pass every check of the harness on random cases of every operator."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from polyaccel.backend import OPERATORS, STATIONS, Backend, TableBackend, load
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Case
from polyaccel_conformance.check import run_case
from polyaccel_conformance.problems.registry import PROBLEM_SETS
from tests.backends.folded.backend import FoldedBackend
from tests.conformance.checks.wrong import EVERY

BACKENDS: dict[str, Callable[[], Backend]] = {
    "cpu": lambda: load("cpu"),
    "composites": lambda: TableBackend("cpu", {}),
    "folded": FoldedBackend,
}
CASES = 4
SEED = 20_261_122


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operator", [name for name in PROBLEM_SETS if name in OPERATORS or name in STATIONS])
def test_random_cases_raise_no_alarm(operator: str, backend: str) -> None:
    problems, draw, bench = PROBLEM_SETS[operator], random.Random(SEED), Bench(BACKENDS[backend]())
    axes = problems.axes()
    run = 0
    for number in range(20 * CASES):
        mended = problems.mend({path: draw.choice(list(values)) for path, values in axes.items()})
        if mended is None or mended.get("ranks", 1) != 1:
            continue
        case = Case.of(operator, mended, SEED + number)
        assert run_case(bench, problems.problem(case), EVERY).failures == (), case
        run += 1
        if run == CASES:
            return
    assert run, "no combination of axes was a case"
