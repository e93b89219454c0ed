"""Every control fails as it must on healthy backends, and says so where it cannot."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from polyaccel.backend import Backend, Entry, TableBackend, load
from polyaccel.backend.composite.linear import linear
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.checks.registry import CHECKS
from polyaccel_conformance.harness.controls import all_of, linear_problem, verdict, wrong_bench
from tests.backends.folded.backend import FoldedBackend
from tests.conformance.checks.wrong import EVERY

BACKENDS: dict[str, Callable[[], Backend]] = {
    "cpu": lambda: load("cpu"),
    "composites": lambda: TableBackend("cpu", {}),
    "folded": FoldedBackend,
}
NEEDS_A_DEVICE = ("evidence.kernels",)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("check", [check.name for check in EVERY if check.name not in NEEDS_A_DEVICE])
def test_every_control_fails_as_it_must(check: str, backend: str) -> None:
    assert CHECKS[check].control(Bench(BACKENDS[backend]())) == "failed as it must"


@pytest.mark.parametrize("check", NEEDS_A_DEVICE)
def test_a_control_that_needs_a_profiler_says_that_it_is_impossible_here(check: str) -> None:
    assert CHECKS[check].control(Bench(TableBackend("cpu", {}))) == "impossible here"


def test_a_right_operator_in_place_of_the_wrong_one_is_no_control() -> None:
    bench = Bench(TableBackend("cpu", {}))
    for name in ("memory.unwritten", "memory.writes", "memory.inputs", "layout.arguments", "invariance.run_to_run"):
        assert verdict(bench, CHECKS[name], linear_problem(), lambda fn: fn) == "did not fail"


def test_an_operator_that_raises_is_no_control() -> None:
    def broken(fn: Callable[..., object]) -> Callable[..., object]:
        def wrong(x: torch.Tensor, weight: object) -> object:
            raise RuntimeError("the device does not do this")

        return wrong

    bench = Bench(TableBackend("cpu", {}))
    assert verdict(bench, CHECKS["memory.writes"], linear_problem(), broken) == "did not fail"


def test_several_controls_are_as_good_as_the_worst() -> None:
    assert all_of("failed as it must", "did not fail") == "did not fail"
    assert all_of("failed as it must", "impossible here", "failed as it must") == "impossible here"
    assert all_of("failed as it must") == "failed as it must"


def test_a_wrong_bench_keeps_name_plan_and_declarations_of_the_right_one() -> None:
    entry = Entry(linear, evidence=("aten::addmm",), name="vendor.gemm", detail="split")
    bench = Bench(TableBackend("cpu", {"linear": entry}, name="vendor"))
    problem = linear_problem()
    wrong = wrong_bench(bench, problem, lambda fn: fn)
    prepared = problem.prepare(wrong)
    assert wrong.resolve("linear", prepared).planned == bench.resolve("linear", prepared).planned
    assert wrong.backend.name == "vendor"
    assert wrong.backend.table()["linear"][0].evidence == ("aten::addmm",)
