"""Cases of ``moe_route`` and ``moe_experts``: every argument is drawn, healthy backends pass, wrong ones do not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from polyaccel.backend import OPERATORS, Backend, TableBackend, load
from polyaccel.backend.composite.moe import moe_route
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Case
from polyaccel_conformance.check import CaseResult, run_case
from polyaccel_conformance.checks.values import VALUE_CHECKS
from polyaccel_conformance.problem import Problem, ProblemSet
from polyaccel_conformance.problems.moe_experts import MoeExpertsProblems
from polyaccel_conformance.problems.moe_route import MoeRouteProblems
from tests.backends.folded.backend import FoldedBackend
from tests.conformance.drawn import problems

SETS: tuple[ProblemSet, ...] = (MoeRouteProblems(), MoeExpertsProblems())
SUBJECTS: dict[str, Callable[[], Backend]] = {
    "cpu": lambda: load("cpu"),
    "composite": lambda: TableBackend("cpu", {}),
    "folded": FoldedBackend,
}
DRAWN_BY = {
    "gate_up": ("dims.intermediate", "structure.quantised", "structure.bits", "structure.bias"),
    "down": ("dims.intermediate", "structure.quantised", "structure.bits", "structure.bias"),
    "step": ("structure.adapters", "structure.ranks", "structure.mix"),
}


def result(backend: Backend, problem: Problem) -> CaseResult:
    return run_case(Bench(backend), problem, list(VALUE_CHECKS.values()))


@pytest.mark.parametrize("problem_set", SETS, ids=lambda s: s.operator)
def test_every_argument_of_the_specification_is_drawn(problem_set: ProblemSet) -> None:
    axes = problem_set.axes()
    for argument in OPERATORS[problem_set.operator].arguments:
        kind = "layouts" if argument.kind == "tensor" else "attributes"
        names = DRAWN_BY.get(argument.name, (f"{kind}.{argument.name}", f"dims.{argument.name}"))
        found = [name for name in names if name in axes]
        assert found, argument.name
        if argument.values:
            assert set(argument.values) <= set(axes[f"attributes.{argument.name}"])


@pytest.mark.parametrize("problem_set", SETS, ids=lambda s: s.operator)
def test_mending_twice_changes_nothing_more_and_reaches_every_value(problem_set: ProblemSet) -> None:
    seen: dict[str, set[object]] = {name: set() for name in problem_set.axes()}
    for problem in problems(problem_set, 300, 41):
        axes = problem.case.axes()
        drawn = {name: axes[name] for name in seen}
        assert problem_set.mend(dict(drawn)) == drawn
        assert Case.from_json(problem.case.to_json()) == problem.case
        for name, value in drawn.items():
            seen[name].add(value)
    assert not {
        name: set(values) - seen[name] for name, values in problem_set.axes().items() if set(values) - seen[name]
    }


@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.parametrize("problem_set", SETS, ids=lambda s: s.operator)
def test_healthy_backends_pass(problem_set: ProblemSet, subject: str) -> None:
    backend = SUBJECTS[subject]()
    failures = [f for p in problems(problem_set, 60, 42) for f in result(backend, p).failures]
    assert failures == []


def wrong_routes() -> dict[str, Callable[..., object]]:
    def last_of_equals(logits: torch.Tensor, *rest: object) -> object:
        weights, ids = moe_route(logits.flip(-1), *rest)  # type: ignore[arg-type]
        return weights, logits.shape[-1] - 1 - ids

    def never_renormalises(logits: torch.Tensor, top_k: int, scoring: str, renormalise: bool, *rest: object) -> object:
        return moe_route(logits, top_k, scoring, False, *rest)  # type: ignore[arg-type]

    def biased_weights(
        logits: torch.Tensor, top_k: int, scoring: str, renormalise: bool, bias: object, *rest: object
    ) -> object:
        weights, ids = moe_route(logits, top_k, scoring, renormalise, bias, *rest)  # type: ignore[arg-type]
        return (weights if bias is None else weights + 0.01), ids

    def no_groups(
        logits: torch.Tensor, top_k: int, scoring: str, renormalise: bool, bias: object, *rest: object
    ) -> object:
        return moe_route(logits, top_k, scoring, renormalise, bias, 1, 1, rest[2])  # type: ignore[arg-type]

    def in_half(logits: torch.Tensor, *rest: object) -> object:
        weights, ids = moe_route(logits, *rest)  # type: ignore[arg-type]
        return weights.bfloat16().float(), ids

    return {f.__name__: f for f in (last_of_equals, never_renormalises, biased_weights, no_groups, in_half)}


@pytest.mark.parametrize("name", wrong_routes())
def test_a_wrong_route_is_seen(name: str) -> None:
    backend = TableBackend("cpu", {"moe_route": wrong_routes()[name]})
    assert any(not result(backend, p).passed for p in problems(MoeRouteProblems(), 80, 43))


def wrong_experts(bench: Bench) -> dict[str, Callable[..., object]]:
    right = bench.backend.composites()["moe_experts"]

    def neighbour(x: torch.Tensor, gate_up: object, down: object, ids: torch.Tensor, *rest: object) -> object:
        return right(x, gate_up, down, ids.roll(1, 0), *rest)

    def first_choice_only(
        x: object, g: object, d: object, ids: torch.Tensor, weights: torch.Tensor, *rest: object
    ) -> object:
        return right(x, g, d, ids[:, :1], weights[:, :1], *rest)

    def last_row_lost(x: torch.Tensor, *rest: object) -> object:
        y = right(x, *rest)
        assert isinstance(y, torch.Tensor)
        y[16:] = 0
        return y

    def ignores_the_map(
        x: object, g: object, d: object, ids: torch.Tensor, w: object, step: object, act: object, expert_map: object
    ) -> object:
        experts = g.spec.experts  # type: ignore[attr-defined]
        return right(x, g, d, ids % experts, w, step, act, None)

    return {f.__name__: f for f in (neighbour, first_choice_only, last_row_lost, ignores_the_map)}


@pytest.mark.parametrize("name", ["neighbour", "first_choice_only", "last_row_lost", "ignores_the_map"])
def test_wrong_experts_are_seen(name: str) -> None:
    wrong = wrong_experts(Bench(TableBackend("cpu", {})))[name]
    backend = TableBackend("cpu", {"moe_experts": wrong})
    assert any(not result(backend, p).passed for p in problems(MoeExpertsProblems(), 60, 44))
