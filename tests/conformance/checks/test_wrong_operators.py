"""Each kind of wrong operator is found by the check that is there for it, and by no other of the harness."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import linear as product

from polyaccel.backend import Numerics, OperatorError, Query, Weight
from polyaccel.backend.composite import dense
from polyaccel.backend.composite.linear import dequantize, linear
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Case
from polyaccel_conformance.check import Check
from polyaccel_conformance.checks.registry import CHECKS
from polyaccel_conformance.harness.controls import NormProblem, linear_problem
from polyaccel_conformance.problem import Problem
from polyaccel_conformance.problems.registry import PROBLEM_SETS
from tests.conformance.checks.wrong import EVERY, around, bench_of, failing

Linear = Callable[[torch.Tensor, Any], torch.Tensor]


def _only(*names: str) -> tuple[Check, ...]:
    return tuple(check for check in EVERY if check.name not in names)


# What leaves the result of ordinary memory right may still be seen in its numbers, by chance.
WITHOUT_VALUES = _only("values.exact", "values.bound")


def _end(x: torch.Tensor) -> int:
    return int(x.storage_offset() + (x.shape[0] - 1) * x.stride(0) + x.shape[1])


def _writes_past_the_end(x: torch.Tensor) -> None:
    x.as_strided((1,), (1,), _end(x)).fill_(1.0)


def _writes_into_a_gap(x: torch.Tensor) -> None:
    x.as_strided((1,), (1,), x.storage_offset() + x.shape[1]).fill_(1.0)


def _scales_and_puts_back(x: torch.Tensor, weight: Weight) -> torch.Tensor:
    x.mul_(2)
    y = linear(x.div(2), weight)
    x.div_(2)
    return y


def _changes_an_input(x: torch.Tensor, weight: Weight) -> torch.Tensor:
    y = linear(x, weight)
    x.add_(1)
    return y


def _leaves_the_tail(x: torch.Tensor, weight: Weight) -> torch.Tensor:
    y = torch.empty(x.shape[0], weight.spec.n)
    y[:-1] = linear(x[:-1], weight)
    return y


def _adds_to_new_memory(x: torch.Tensor, weight: Weight) -> torch.Tensor:
    return torch.empty(x.shape[0], weight.spec.n).add_(linear(x, weight))


def _reads_a_gap(x: torch.Tensor, weight: Weight) -> torch.Tensor:
    y = linear(x, weight)
    y[0, 0] += x.as_strided((), (), x.storage_offset() + x.shape[1])
    return y


def _ignores_strides(x: torch.Tensor, weight: Weight) -> torch.Tensor:
    return linear(x.as_strided(x.shape, (x.shape[1], 1), x.storage_offset()), weight)


def _copies_silently(x: torch.Tensor, weight: Weight) -> torch.Tensor:
    return linear(x.contiguous(), weight)


def _writes_past_new_memory(x: torch.Tensor, weight: Weight) -> torch.Tensor:
    y = torch.empty(x.shape[0], weight.spec.n)
    y.copy_(linear(x, weight))
    if y.untyped_storage().nbytes() > y.nbytes:
        y.as_strided((1,), (1,), y.storage_offset() + y.numel()).fill_(1.0)
    return y


def test_the_right_operator_passes_every_check() -> None:
    assert failing(bench_of(linear)) == {}
    assert failing(bench_of(linear), linear_problem(data="integers")) == {}
    assert failing(bench_of(linear), linear_problem(layout="contiguous")) == {}


@pytest.mark.parametrize(
    ("wrong", "check", "cause"),
    [
        (around(_writes_past_the_end), "memory.writes", "writes outside of argument 'x'"),
        (around(_writes_into_a_gap), "memory.writes", "writes outside of argument 'x'"),
        (_writes_past_new_memory, "memory.writes", "writes outside of memory that the call allocated"),
        (_leaves_the_tail, "memory.unwritten", "unwritten elements"),
        (_adds_to_new_memory, "memory.reads", "reads memory that is not its own"),
        (_reads_a_gap, "memory.reads", "reads memory that is not its own"),
        (_changes_an_input, "memory.inputs", "changes 'x'"),
        (_scales_and_puts_back, "memory.inputs", "writes to 'x'"),
        (_copies_silently, "layout.arguments", "copies 'x' uncounted"),
    ],
)
def test_a_fault_of_memory_is_found_by_the_check_that_is_there_for_it(wrong: Linear, check: str, cause: str) -> None:
    """Evidence is not asked: what these do beside the product are operators of torch that linear does not declare."""
    checks = tuple(c for c in WITHOUT_VALUES if c.name != "evidence.native" and not c.name.startswith("invariance"))
    assert failing(bench_of(wrong), checks=checks) == {check: cause}


def test_ignored_strides_show_as_a_dependence_on_layout_and_on_what_lies_in_the_gaps() -> None:
    checks = tuple(c for c in EVERY if c.name.startswith(("memory", "layout")))
    found = failing(bench_of(_ignores_strides), checks=checks)
    assert found == {
        "memory.reads": "reads memory that is not its own",
        "layout.arguments": "result depends on the layout",
    }
    offset = linear_problem(layout="offset")
    assert failing(bench_of(_ignores_strides), offset, checks) == {}


def _calls_a_composite(bench: Bench) -> Linear:
    def wrong(x: torch.Tensor, weight: Any) -> torch.Tensor:
        bench.backend.composites()["gelu"](x)
        return linear(x, weight)

    return wrong


@pytest.mark.parametrize(
    ("before", "cause"),
    [
        (lambda x: x.cos(), "undeclared operators"),
        (lambda x: x.to("meta"), "copy to another device"),
        (lambda x: x[0, 0].item(), "host synchronisation"),
        (lambda x: torch.nonzero(x), "host synchronisation"),
    ],
)
def test_what_a_native_call_may_not_execute_is_evidence_against_it(
    before: Callable[[torch.Tensor], object], cause: str
) -> None:
    assert failing(bench_of(around(before))) == {"evidence.native": cause}


def test_a_composite_inside_a_native_call_is_evidence_against_it() -> None:
    fallback: dict[str, Linear] = {}
    bench = bench_of(lambda x, weight: fallback["linear"](x, weight))
    fallback["linear"] = _calls_a_composite(bench)
    assert failing(bench) == {"evidence.native": "nested composite"}


def test_a_result_of_an_earlier_call_has_no_device_activity() -> None:
    problem = linear_problem()
    prepared = problem.prepare(bench_of(linear))
    right = linear(problem.operands["x"].torch(), prepared.arguments["weight"])  # type: ignore[arg-type]
    assert (
        failing(bench_of(lambda x, weight: right), problem, _only("errors.arguments", "nonfinite.rules"))[
            "evidence.native"
        ]
        == "no device activity"
    )


def test_a_declaration_by_name_and_overload_allows_that_overload_only() -> None:
    exact = ("aten::addmm.default", "aten::mm.default")
    assert failing(bench_of(linear, evidence=exact)) == {}
    assert failing(bench_of(linear, evidence=("aten::addmm.out",))) == {"evidence.native": "undeclared operators"}


def _silu_problem() -> Problem:
    problems = PROBLEM_SETS["silu_and_mul"]
    return problems.problem(Case.of("silu_and_mul", {path: values[0] for path, values in problems.axes().items()}, 1))


def test_an_answer_that_changes_is_not_pure() -> None:
    asked: list[Query] = []

    def supports(query: Query) -> list[str]:
        asked.append(query)
        return [] if len(asked) % 2 else ["the queue is full at present"]

    bench = bench_of(dense.silu_and_mul, "silu_and_mul", supports=supports)
    assert failing(bench, _silu_problem(), (CHECKS["support.pure"],)) == {"support.pure": "answers differ"}


def _asks_the_device(query: Query) -> list[str]:
    return ["there is no room at all"][: int(torch.zeros(1).sum())]


def test_an_answer_that_asks_the_device_is_not_host_only() -> None:
    bench = bench_of(
        dense.silu_and_mul, "silu_and_mul", supports=lambda query: ["no room at all"][: int(torch.zeros(1).sum())]
    )
    assert failing(bench, _silu_problem(), (CHECKS["support.pure"],)) == {"support.pure": "not host-only"}


def test_a_reason_of_one_word_is_no_reason() -> None:
    bench = bench_of(dense.silu_and_mul, "silu_and_mul", supports=lambda query: ["unsupported"])
    assert failing(bench, _silu_problem()) == {"support.pure": "reason is no sentence"}


def test_an_operator_that_takes_operands_of_any_width_is_found() -> None:
    def wrong(x: torch.Tensor, weight: Any) -> torch.Tensor:
        return linear(x[:, -weight.spec.k :].to(weight.spec.dtype), weight)

    found = failing(bench_of(wrong), linear_problem(layout="contiguous"))
    assert found == {"errors.arguments": "shape of 'x': accepted"}


def test_an_error_that_names_no_argument_is_found() -> None:
    def wrong(x: torch.Tensor, weight: Any) -> torch.Tensor:
        if x.shape[1] != weight.spec.k or x.dtype != weight.spec.dtype:
            raise OperatorError("linear", "cannot multiply")
        return linear(x, weight)

    found = failing(bench_of(wrong), linear_problem(layout="contiguous"))
    assert found == {"errors.arguments": "dtype of 'x': error names no argument"}


def test_a_result_that_differs_from_run_to_run_is_not_deterministic() -> None:
    calls: list[int] = []

    def wrong(x: torch.Tensor, weight: Any) -> torch.Tensor:
        calls.append(1)
        return linear(x, weight) + len(calls)

    checks = tuple(c for c in EVERY if c.name in ("memory.reads", "invariance.run_to_run"))
    assert failing(bench_of(wrong), checks=checks) == {"invariance.run_to_run": "not deterministic"}


def test_low_input_and_accumulator_bits_are_measured() -> None:
    def few_input_bits(x: torch.Tensor, weight: Any) -> torch.Tensor:
        return linear(x.view(torch.int32).bitwise_and(-(1 << 13)).view(torch.float32).contiguous(), weight)

    problem, checks = linear_problem(layout="contiguous"), (CHECKS["numerics.measured"],)
    assert failing(bench_of(few_input_bits), problem, checks) == {"numerics.measured": "input bits"}

    def few_accumulator_bits(x: torch.Tensor, weight: Any) -> torch.Tensor:
        w = dequantize(weight)
        y = torch.zeros(x.shape[0], w.shape[0])
        for column in range(x.shape[1]):
            y = (y + x[:, column, None] * w[None, :, column]).half().float()
        return y

    assert failing(bench_of(few_accumulator_bits), problem, checks) == {"numerics.measured": "accumulator bits"}


def test_a_declared_accumulator_below_the_floor_is_a_named_restriction() -> None:
    bench = bench_of(linear, numerics=Numerics(accumulator=torch.bfloat16))
    found = failing(bench, linear_problem(layout="contiguous"))
    assert found == {"numerics.measured": "restriction: accumulator bfloat16"}


def test_a_swallowed_nan_is_found() -> None:
    def wrong(x: torch.Tensor, weight: Any) -> torch.Tensor:
        return linear(torch.nan_to_num(x), weight)

    found = failing(bench_of(wrong), linear_problem(layout="contiguous"), _only("evidence.native"))
    assert found == {"nonfinite.rules": "nan in 'x': does not propagate"}


def test_a_nan_that_reaches_other_rows_is_found() -> None:
    def wrong(x: torch.Tensor, weight: Any) -> torch.Tensor:
        return product(x, dequantize(weight), weight.bias) + 0 * x.sum()

    found = failing(bench_of(wrong), linear_problem(layout="contiguous"), _only("evidence.native", "invariance.batch"))
    assert found == {"nonfinite.rules": "nan in 'x': spreads"}


def test_operands_that_may_be_one_tensor_are_tried_as_one() -> None:
    def wrong(x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor) -> object:
        residual.mul_(0.5)
        result = dense.rms_norm(x, weight, eps, residual * 2)
        residual.mul_(2)
        return result

    checks = tuple(c for c in EVERY if c.name.startswith("alias"))
    assert failing(bench_of(wrong, "rms_norm"), NormProblem(), checks) == {"alias.allowed": "wrong where residual is x"}
    assert failing(bench_of(dense.rms_norm, "rms_norm"), NormProblem(), checks) == {}


def test_a_crash_is_a_failure_of_the_first_check_that_meets_it() -> None:
    def wrong(x: torch.Tensor, weight: Any) -> torch.Tensor:
        raise ZeroDivisionError("division by zero")

    checks = tuple(c for c in EVERY if c.name in ("values.bound", "memory.unwritten", "memory.inputs"))
    assert failing(bench_of(wrong), checks=checks) == {
        "values.bound": "crash: ZeroDivisionError",
        "memory.unwritten": "crash: ZeroDivisionError",
    }


def test_an_error_of_the_backend_is_reported_once() -> None:
    def wrong(x: torch.Tensor, weight: Any) -> torch.Tensor:
        raise OperatorError("linear", "no")

    checks = tuple(c for c in EVERY if c.name.startswith(("values", "invariance.run")))
    assert failing(bench_of(wrong), checks=checks) == {"values.bound": "error"}
