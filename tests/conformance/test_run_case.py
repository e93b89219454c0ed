"""What is recorded of one case."""

from __future__ import annotations

from typing import Any

import torch

from polyaccel.backend import OperatorError, TableBackend
from polyaccel.backend.composite.linear import linear
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.check import Check, Control, Failure, run_case
from polyaccel_conformance.checks.values import VALUE_CHECKS
from polyaccel_conformance.harness.controls import NormProblem, linear_problem
from polyaccel_conformance.problem import Prepared
from polyaccel_conformance.problems.linear import LinearProblem
from polyaccel_conformance.trial import LARGE, POISONED, Setting, Trial
from tests.conformance.checks.wrong import EVERY, bench_of

VALUES = tuple(VALUE_CHECKS.values())


def test_a_passed_case_has_plan_headroom_digests_and_the_hash_of_its_outputs() -> None:
    result = run_case(bench_of(linear), linear_problem(), VALUES)
    assert result.passed
    assert (result.kind, result.implementation, result.checks) == ("native", "table.linear", ("values.bound",))
    assert 0 < result.headroom["y"] < 1
    assert set(result.digests) == {"x", "weight", "bias"} or "x" in result.digests
    assert len(result.observed) == 32
    assert result.seconds > 0


def test_the_hash_of_the_outputs_depends_on_their_bits_and_on_nothing_else() -> None:
    first, again = (run_case(bench_of(linear), linear_problem(), VALUES).observed for _ in range(2))
    other = run_case(bench_of(lambda x, w: linear(x, w).nextafter(torch.tensor(1e9))), linear_problem(), VALUES)
    assert first == again
    assert first != other.observed
    assert run_case(bench_of(linear), linear_problem(), EVERY).observed == first


def test_a_composite_is_recorded_as_one_and_is_no_failure() -> None:
    result = run_case(Bench(TableBackend("cpu", {})), NormProblem(), EVERY)
    assert result.passed
    assert (result.kind, result.implementation) == ("composite", "composite.rms_norm")


def test_exact_outputs_have_no_headroom() -> None:
    assert run_case(bench_of(linear), linear_problem(data="integers"), VALUES).headroom == {}


def test_an_error_is_a_failure_with_its_type_and_leaves_no_hash() -> None:
    def broken(x: torch.Tensor, weight: Any) -> torch.Tensor:
        raise OperatorError("linear", "out of order")

    result = run_case(bench_of(broken), linear_problem(), VALUES)
    assert [failure.cause for failure in result.failures] == ["error"]
    assert "out of order" in result.failures[0].message
    assert (result.observed, result.headroom) == ("", {})


def test_what_torch_raises_is_typed_by_the_plan_and_names_the_operands() -> None:
    def broken(x: torch.Tensor, weight: Any) -> torch.Tensor:
        return x @ torch.ones(3)

    message = run_case(bench_of(broken), linear_problem(), VALUES).failures[0].message
    assert message.startswith("OperatorError: operator 'linear': RuntimeError")
    assert "x: float32[5, 16] stride [19, 1] on cpu, non-contiguous" in message


def test_a_crash_in_the_suite_or_the_backend_says_where() -> None:
    class Crashing(Check):
        name = "crashing"

        def run(self, trial: Trial) -> Failure | None:
            raise LookupError("no such thing")

        def control(self, bench: Bench) -> Control:
            return "impossible here"

    failure = run_case(bench_of(linear), linear_problem(), (Crashing(),)).failures[0]
    assert (failure.check, failure.cause) == ("crashing", "crash: LookupError")
    assert "no such thing (in run, test_run_case.py line" in failure.message


def test_checks_that_do_not_apply_are_not_asked() -> None:
    result = run_case(bench_of(linear), linear_problem(), EVERY)
    assert "values.exact" not in result.checks
    assert "alias.allowed" not in result.checks
    assert "layout.arguments" in result.checks


class _Counting(LinearProblem):
    def __init__(self) -> None:
        super().__init__(linear_problem().case)
        self.placed, self.released, self.asked = 0, 0, 0

    def prepare(self, bench: Bench) -> Prepared:
        from dataclasses import replace

        self.placed += 1
        return replace(super().prepare(bench), release=self._release)

    def _release(self) -> None:
        self.released += 1

    def expected(self) -> Any:
        self.asked += 1
        return super().expected()


def test_calls_share_the_weight_the_oracle_and_each_other() -> None:
    problem, calls = _Counting(), []

    def counted(x: torch.Tensor, weight: Any) -> torch.Tensor:
        calls.append(1)
        return linear(x, weight)

    trial = Trial(bench_of(counted), problem)
    for _ in range(2):
        for setting in (Setting(), POISONED, LARGE):
            trial.ask(setting)
        _ = trial.expected
    assert (len(calls), problem.placed, problem.asked, problem.released) == (3, 1, 1, 0)
    trial.close()
    trial.close()
    assert problem.released == 1


def test_a_typed_refusal_of_a_layout_outside_of_the_contract_is_right() -> None:
    def picky(x: torch.Tensor, weight: Any) -> torch.Tensor:
        if x.stride(1) != 1:
            raise OperatorError.describe("linear", "takes dense rows", {"x": x})
        return linear(x, weight)

    transposed = linear_problem(layout="transposed")
    assert run_case(bench_of(picky), transposed, EVERY).failures == ()
    assert run_case(bench_of(linear), transposed, EVERY).failures == ()

    def refuses_promised(x: torch.Tensor, weight: Any) -> torch.Tensor:
        if not x.is_contiguous():
            raise OperatorError.describe("linear", "takes contiguous rows", {"x": x})
        return linear(x, weight)

    found = run_case(bench_of(refuses_promised), linear_problem(), EVERY).failures
    assert [failure.cause for failure in found][:1] == ["error"]
