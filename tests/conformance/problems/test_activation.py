"""The problems of the activations: complete, passed by healthy backends, failed by planted bugs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from polyaccel.backend import TableBackend
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.problems.activation import GeluProblems, SiluAndMulProblems
from tests.conformance.drawn import problems, verdict


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
