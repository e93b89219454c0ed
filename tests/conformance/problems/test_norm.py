"""The problems of the norms: complete, passed by healthy backends, failed by planted bugs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from polyaccel.backend import TableBackend
from polyaccel.backend.composite import dense
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.problems.norm import LayerNormProblems, RmsNormProblems
from tests.conformance.drawn import problems, verdict

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
