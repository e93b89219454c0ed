"""The problems of the activations: complete, passed by healthy backends, failed by planted bugs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyaccel.backend import Backend, TableBackend, load
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.problem import ProblemSet
from polyaccel_conformance.problems.activation import GeluProblems, SiluAndMulProblems
from tests.backends.folded.backend import FoldedBackend
from tests.conformance.drawn import problems, undrawn, unmended, verdict

BACKENDS: tuple[Callable[[], Backend], ...] = (lambda: load("cpu"), lambda: TableBackend("cpu", {}), FoldedBackend)
NAMES = ("cpu", "composite", "folded")
SETS = (SiluAndMulProblems(), GeluProblems())


@pytest.mark.parametrize("problem_set", SETS, ids=lambda s: s.operator)
def test_every_argument_and_attribute_is_a_drawn_axis(problem_set: ProblemSet) -> None:
    assert undrawn(problem_set) == []


@settings(max_examples=25, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("problem_set", SETS, ids=lambda s: s.operator)
def test_every_combination_of_axes_is_a_case(problem_set: ProblemSet, data: st.DataObject) -> None:
    unmended(problem_set, lambda values: data.draw(st.sampled_from(list(values))))


@pytest.mark.parametrize("backend", BACKENDS, ids=NAMES)
@pytest.mark.parametrize("problem_set", SETS, ids=lambda s: s.operator)
@pytest.mark.parametrize("count", [60, pytest.param(1500, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_healthy_backends_pass(problem_set: ProblemSet, backend: Callable[[], Backend], count: int) -> None:
    bench = Bench(backend())
    found = [(p.case, failure) for p in problems(problem_set, count, 100) if (failure := verdict(bench, p))]
    assert found == []


def swapped(x: torch.Tensor) -> torch.Tensor:
    up, gate = x.chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate.float()) * up.float()).to(x.dtype)


def without_up(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(x.chunk(2, dim=-1)[0].float()).to(x.dtype)


def quick_gelu(x: torch.Tensor, approximate: str) -> torch.Tensor:
    return (x.float() * torch.sigmoid(1.702 * x.float())).to(x.dtype)


def one_form(x: torch.Tensor, approximate: str) -> torch.Tensor:
    return torch.nn.functional.gelu(x.float(), approximate="tanh").to(x.dtype)


@pytest.mark.parametrize("wrong", [swapped, without_up])
@pytest.mark.parametrize("data", ["normal", "saturated"])
def test_a_wrong_silu_fails(wrong: Callable[..., object], data: str) -> None:
    bench = Bench(TableBackend("cpu", {"silu_and_mul": wrong}))
    where = {"dims__tokens": (3,), "dims__n": (33,), "data": (data,)}
    assert all(verdict(bench, p) for p in problems(SiluAndMulProblems(), 6, 7, **where))


@pytest.mark.parametrize("wrong", [quick_gelu, one_form])
def test_another_gelu_fails(wrong: Callable[..., object]) -> None:
    bench = Bench(TableBackend("cpu", {"gelu": wrong}))
    where = {"dtype": ("float32",), "attributes__approximate": ("none",), "dims__tokens": (3,), "dims__n": (33,)}
    assert all(verdict(bench, p) for p in problems(GeluProblems(), 4, 7, data=("normal",), **where))
