"""Probes find where an operator keeps fewer bits than it must, and nothing on healthy operators."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import pytest
import torch

from polyaccel.backend import Backend, Entry, Numerics, TableBackend, load
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Case
from polyaccel_conformance.check import run_case
from polyaccel_conformance.checks.registry import CHECKS
from polyaccel_conformance.formats import FORMATS
from polyaccel_conformance.probes.registry import PROBES
from polyaccel_conformance.problem import Problem
from polyaccel_conformance.problems.registry import PROBLEM_SETS
from tests.backends.folded.backend import FoldedBackend
from tests.conformance.probes import lower

BF16, F16 = torch.bfloat16, torch.float16
CHECK = CHECKS["numerics.measured"]
HEALTHY: Mapping[str, Callable[[], Backend]] = {
    "cpu": lambda: load("cpu"),
    "composites": lambda: TableBackend("cpu", {}),
    "folded": FoldedBackend,
}


def simplest(operator: str, dtype: str) -> Problem:
    """The case with the first value of every axis, and a sum of some products."""
    problem_set = PROBLEM_SETS[operator]
    axes = {path: values[0] for path, values in problem_set.axes().items()}
    longer = {"dims.k": 16} if "dims.k" in axes else {}
    mended = problem_set.mend(axes | longer | {"dtype": dtype})
    assert mended is not None
    return problem_set.problem(Case.of(operator, mended, 1))


def found(bench: Bench, operator: str, dtype: str) -> str:
    """The cause of the check's failure, empty where it passes."""
    problem = simplest(operator, dtype)
    assert CHECK.applies(problem.case, problem)
    failures = run_case(bench, problem, (CHECK,)).failures
    return failures[0].cause if failures else ""


@pytest.mark.parametrize("backend", HEALTHY)
@pytest.mark.parametrize("operator", PROBES)
def test_a_healthy_operator_keeps_what_the_contract_asks(backend: str, operator: str) -> None:
    bench = Bench(HEALTHY[backend]())
    assert {dtype: found(bench, operator, dtype) for dtype in FORMATS} == dict.fromkeys(FORMATS, "")


LOWER: tuple[tuple[str, str, str, Mapping[str, lower.Function]], ...] = (
    ("linear", "bfloat16", "accumulator bits", {"linear": lower.linear(BF16)}),
    ("linear", "float16", "accumulator bits", {"linear": lower.linear(F16)}),
    ("linear", "float32", "input bits", {"linear": lower.linear(inputs=BF16)}),
    ("rms_norm", "float32", "statistic bits of mean of squares", {"rms_norm": lower.rms_norm(F16)}),
    ("rms_norm", "bfloat16", "statistic bits of mean of squares", {"rms_norm": lower.rms_norm(BF16)}),
    ("rms_norm", "float16", "statistic bits of mean of squares", {"rms_norm": lower.rms_norm(F16)}),
    ("layer_norm", "float32", "statistic bits of mean of squares", {"layer_norm": lower.layer_norm(BF16)}),
    ("layer_norm", "bfloat16", "statistic bits of mean of squares", {"layer_norm": lower.layer_norm(BF16)}),
    ("layer_norm", "float16", "statistic bits of mean of squares", {"layer_norm": lower.layer_norm(F16)}),
    ("rotary_embedding", "float32", "tables bits", {"rotary_embedding": lower.rotary_embedding(F16)}),
    ("rotary_embedding", "bfloat16", "tables bits", {"rotary_embedding": lower.rotary_embedding(BF16)}),
    ("rotary_embedding", "float16", "tables bits", {"rotary_embedding": lower.rotary_embedding(F16)}),
    ("silu_and_mul", "float32", "arithmetic bits", {"silu_and_mul": lower.silu_and_mul(F16)}),
    ("silu_and_mul", "float16", "input bits", {"silu_and_mul": lower.rounding_first("silu_and_mul", BF16)}),
    ("gelu", "float32", "arithmetic bits", {"gelu": lower.gelu(F16)}),
    ("gelu", "float16", "input bits", {"gelu": lower.rounding_first("gelu", BF16)}),
    ("dense_attention", "float32", "input bits of q k", {"dense_attention": lower.dense_attention(inputs=BF16)}),
    ("dense_attention", "bfloat16", "accumulator bits of q k", {"dense_attention": lower.dense_attention(scores=F16)}),
    ("dense_attention", "bfloat16", "scores bits of q k", {"dense_attention": lower.dense_attention(kept=BF16)}),
    ("dense_attention", "float16", "scores bits of q k", {"dense_attention": lower.dense_attention(kept=F16)}),
    ("dense_attention", "float32", "arithmetic bits of p", {"dense_attention": lower.dense_attention(p=BF16)}),
    ("dense_attention", "bfloat16", "accumulator bits of p v", {"dense_attention": lower.dense_attention(values=BF16)}),
    ("dense_attention", "float16", "accumulator bits of p v", {"dense_attention": lower.dense_attention(values=F16)}),
    (
        "paged_attention",
        "float32",
        "input bits of q k",
        {"paged_attention": lower.rounding_first("paged_attention", BF16)},
    ),
    ("moe_route", "bfloat16", "arithmetic bits", {"moe_route": lower.rounding_first("moe_route", torch.float8_e5m2)}),
    ("moe_experts", "bfloat16", "accumulator bits of gate_up", {"moe_experts": lower.moe_experts(up=BF16)}),
    ("moe_experts", "float16", "accumulator bits of down", {"moe_experts": lower.moe_experts(down=F16)}),
    ("moe_experts", "float32", "input bits of gate_up", {"moe_experts": lower.moe_experts(inner=BF16)}),
    ("sample", "float32", "arithmetic bits", {"sample": lower.sample(F16)}),
    ("sgmv", "bfloat16", "accumulator bits of x A", {"sgmv": lower.sgmv(shrink=BF16)}),
    ("sgmv", "float16", "accumulator bits of h B", {"sgmv": lower.sgmv(expand=F16)}),
    ("sgmv", "float32", "input bits of x A", {"sgmv": lower.sgmv(h_in=BF16)}),
    ("sgmv_shrink", "bfloat16", "accumulator bits of x A", {"sgmv_shrink": lower.sgmv_shrink(F16)}),
    ("sgmv_expand", "float16", "accumulator bits of h B", {"sgmv_expand": lower.sgmv_expand(F16)}),
    ("column_linear", "bfloat16", "accumulator bits of x W", {"linear": lower.linear(BF16)}),
    ("row_parallel_linear", "bfloat16", "accumulator bits of x A", {"sgmv": lower.sgmv(shrink=F16)}),
    ("gate_up_act", "bfloat16", "accumulator bits of h B", {"sgmv": lower.sgmv(expand=BF16)}),
    ("qkv_rope_cache", "float16", "accumulator bits of x W", {"linear": lower.linear(F16)}),
    ("row_parallel_add_norm", "float32", "input bits of x W", {"linear": lower.linear(inputs=BF16)}),
    ("row_parallel_add_norm", "bfloat16", "statistic bits of mean of squares", {"rms_norm": lower.rms_norm(BF16)}),
)


@pytest.mark.parametrize(("operator", "dtype", "cause", "entries"), LOWER, ids=lambda value: str(value)[:40])
def test_fewer_bits_are_found_where_they_are_lost(
    operator: str, dtype: str, cause: str, entries: Mapping[str, lower.Function]
) -> None:
    assert found(Bench(TableBackend("cpu", entries)), operator, dtype) == cause


def test_every_operator_but_lookups_is_found_with_fewer_bits() -> None:
    """A lookup has no operand of its own on the device: the check's control changes its result instead."""
    assert {operator for operator, *_ in LOWER} == set(PROBES) - {"embedding"}


@pytest.mark.parametrize(
    ("operator", "declared", "cause"),
    [
        ("linear", Numerics(accumulator=BF16), "restriction: accumulator bfloat16"),
        ("rms_norm", Numerics(accumulator=F16), "restriction: accumulator float16"),
        ("sgmv", Numerics(intermediates=MappingProxyType({"h": ("bfloat16",)})), "restriction: h bfloat16"),
        ("dense_attention", Numerics(intermediates=MappingProxyType({"p": ("float16",)})), "restriction: p float16"),
        ("linear", Numerics(accumulator=torch.float64), "accumulator bits"),
        ("sgmv", Numerics(intermediates=MappingProxyType({"h": ("float32",)})), ""),
        ("rms_norm", Numerics(intermediates=MappingProxyType({"normed": ("x",)})), ""),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_declaration_below_the_floor_is_named_and_one_above_it_is_measured(
    operator: str, declared: Numerics, cause: str
) -> None:
    composites = TableBackend("cpu", {}).composites()
    fn = lower.linear(BF16) if cause == "accumulator bits" else composites.get(operator, lower.linear())
    bench = Bench(TableBackend("cpu", {operator: Entry(fn, numerics=declared)}))
    assert found(bench, operator, "float32") == cause


def test_what_was_measured_is_noted() -> None:
    result = run_case(Bench(TableBackend("cpu", {})), simplest("sgmv", "bfloat16"), (CHECK,))
    assert result.notes == (
        "numerics: x A: input 8 bits, accumulator at least 24 bits",
        "numerics: h B: input 8 bits, accumulator at least 24 bits",
    )


def test_a_station_is_held_to_the_floor_of_each_of_its_parts() -> None:
    normed = Numerics(intermediates=MappingProxyType({"normed": ("x",)}))
    parts = {
        "linear": lower.linear(),
        "sgmv": lower.sgmv(),
        "rms_norm": Entry(lower.rms_norm(torch.float32), numerics=normed),
    }
    assert found(Bench(TableBackend("cpu", parts)), "row_parallel_add_norm", "bfloat16") == ""
