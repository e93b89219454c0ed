"""The problems of the norms: complete, passed by healthy backends, failed by planted bugs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyaccel.backend import Backend, TableBackend, load
from polyaccel.backend.composite import dense
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.problem import ProblemSet
from polyaccel_conformance.problems.norm import LayerNormProblems, RmsNormProblems
from tests.backends.folded.backend import FoldedBackend
from tests.conformance.drawn import problems, undrawn, unmended, verdict

BACKENDS: tuple[Callable[[], Backend], ...] = (lambda: load("cpu"), lambda: TableBackend("cpu", {}), FoldedBackend)
NAMES = ("cpu", "composite", "folded")
SETS = (RmsNormProblems(), LayerNormProblems())


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


Norm = Callable[..., object]


def without_eps(x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None) -> object:
    return dense.rms_norm(x, weight, 0.0, residual)


def eps_beside_the_root(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> object:
    s = x if residual is None else x + residual
    normed = (s.float() / (s.float().square().mean(-1, keepdim=True).sqrt() + eps) * weight.float()).to(x.dtype)
    return normed if residual is None else (normed, s)


def residual_forgotten(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> object:
    normed = dense.rms_norm(x, weight, eps)
    return normed if residual is None else (normed, x + residual)


def next_weight(x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None) -> object:
    return dense.rms_norm(x, weight.roll(1), eps, residual)


def truncated(x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None) -> object:
    wide = dense.rms_norm(x.float(), weight.float(), eps, None if residual is None else residual.float())
    cut = [(t.view(torch.int32) & -65536).view(torch.float32).to(x.dtype) for t in wide] if residual is not None else []
    return tuple(cut) if cut else (wide.view(torch.int32) & -65536).view(torch.float32).to(x.dtype)  # type: ignore[union-attr]


@pytest.mark.parametrize("data", ["integers", "normal"])
@pytest.mark.parametrize("wrong", [without_eps, eps_beside_the_root, next_weight])
def test_a_wrong_rms_norm_fails(wrong: Norm, data: str) -> None:
    bench = Bench(TableBackend("cpu", {"rms_norm": wrong}))
    where = {"dims__tokens": (3,), "dims__hidden": (33,), "attributes__eps": (1.0,), "data": (data,)}
    assert all(verdict(bench, p) for p in problems(RmsNormProblems(), 6, 7, **where))


def test_a_residual_that_is_not_normed_fails() -> None:
    bench = Bench(TableBackend("cpu", {"rms_norm": residual_forgotten}))
    where = {"dims__tokens": (3,), "dims__hidden": (33,), "structure__residual": (True,), "alias": ("none",)}
    assert all(verdict(bench, p) for p in problems(RmsNormProblems(), 4, 7, data=("normal",), **where))


def test_a_truncating_store_fails_in_the_exact_tier() -> None:
    bench = Bench(TableBackend("cpu", {"rms_norm": truncated}))
    where = {"dtype": ("bfloat16",), "dims__tokens": (3,), "dims__hidden": (64,), "data": ("integers",)}
    assert all(verdict(bench, p) for p in problems(RmsNormProblems(), 4, 7, **where))


def test_a_layer_norm_that_forgets_the_mean_fails() -> None:
    def wrong(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
        y = x.float() * torch.rsqrt(x.float().var(-1, keepdim=True, correction=0) + eps) * weight.float()
        return (y if bias is None else y + bias.float()).to(x.dtype)

    bench = Bench(TableBackend("cpu", {"layer_norm": wrong}))
    where = {"dims__tokens": (7,), "dims__hidden": (33,)}
    assert all(verdict(bench, p) for p in problems(LayerNormProblems(), 8, 7, data=("integers", "normal"), **where))
