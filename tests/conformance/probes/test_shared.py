"""What probes measure is measured once a run, and is nothing that a case has to do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, cast

import pytest

from polyaccel.backend import load
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.check import run_case
from polyaccel_conformance.checks.registry import CHECKS
from polyaccel_conformance.probes import shared
from polyaccel_conformance.probes.registry import PROBES
from polyaccel_conformance.problem import Problem
from polyaccel_conformance.workers.measuring import SharedProbes
from polyaccel_conformance.workers.pool import Answer, Job, Pool
from tests.conformance.probes.test_probes import simplest

CHECK = CHECKS["numerics.measured"]
OPERATORS = [name for name in PROBES if name != "linear"]


class _Pool:
    """Answers as one worker does, or dies."""

    def __init__(self, *, dies: bool = False) -> None:
        self.asked: list[tuple[str, str]] = []
        self._bench, self._dies = Bench(load("cpu")), dies

    def run(self, jobs: Iterable[Job]) -> Iterator[Answer]:
        for job in jobs:
            operator, dtype = job.request["operator"], job.request["dtype"]
            self.asked.append((operator, dtype))
            if self._dies:
                yield Answer(job=job, reply={}, died="crash: signal 11")
            else:
                yield Answer(job=job, reply={"measured": shared.measure(self._bench, operator, dtype)})


def _measured(problems: Iterable[Problem], pool: _Pool) -> SharedProbes:
    probes = SharedProbes()
    for problem in problems:
        probes.measure(cast("Pool", pool), [problem.case], (CHECK.name, "values.bound"))
    return probes


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_case_says_the_same_whoever_measured(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = simplest(operator, "bfloat16")
    own = run_case(Bench(load("cpu")), problem, (CHECK,))
    probes = _measured([problem], _Pool())
    found = probes.of(problem.case)["measured"]
    bench = Bench(load("cpu"))
    shared.remember(bench, problem.case, found)

    def never(*_: Any) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr(shared, "PROBES", dict.fromkeys(PROBES, never))
    told = run_case(bench, problem, (CHECK,))
    assert own.notes
    assert (told.failures, told.notes, told.checks) == ((), own.notes, own.checks)


def test_an_operator_and_dtype_are_measured_once() -> None:
    pool = _Pool()
    _measured([simplest("gelu", "float32"), simplest("gelu", "float32"), simplest("gelu", "float16")], pool)
    assert pool.asked == [("gelu", "float32"), ("gelu", "float16")]


def test_what_is_measured_at_a_cases_own_size_or_in_strange_operands_is_left_to_it() -> None:
    case = simplest("gelu", "float32").case
    for other in (
        simplest("linear", "float32").case,
        case.with_(layouts__x="row_padded"),
        case.with_(data="nonfinite"),
        case.with_(stream="side"),
    ):
        assert shared.shared_probe(other) is None
    assert shared.shared_probe(case) == ("gelu", "float32")


def test_what_could_not_be_measured_is_left_to_the_first_case_that_asks_and_not_tried_again() -> None:
    pool = _Pool(dies=True)
    problem = simplest("gelu", "float32")
    probes = _measured([problem, problem], pool)
    assert pool.asked == [("gelu", "float32")]
    assert probes.of(problem.case) == {}


def test_nothing_is_measured_where_no_check_asks() -> None:
    pool = _Pool()
    SharedProbes().measure(cast("Pool", pool), [simplest("gelu", "float32").case], ("values.bound",))
    assert pool.asked == []
