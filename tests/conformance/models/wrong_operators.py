"""Backends with one wrong operator each, found by their names in this file: what bisecting must name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from polyaccel.backend import Backend, RowSet, Step, TableBackend, Weight
from polyaccel.backend.composite.dense import rms_norm as right_norm
from polyaccel.backend.composite.dense import silu_and_mul as right_silu
from polyaccel.backend.composite.linear import linear as right_linear
from polyaccel.backend.composite.lora import sgmv as right_sgmv


def _silu(x: torch.Tensor) -> torch.Tensor:
    return right_silu(x) / 2


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None) -> object:
    return right_norm(x, weight, 0.5, residual)


def _sgmv(y: torch.Tensor, x: torch.Tensor, weight: Weight, step: Step, row_set: RowSet = "tokens") -> torch.Tensor:
    return right_sgmv(y, 2 * x, weight, step, row_set)


def _linear(x: torch.Tensor, weight: Weight) -> torch.Tensor:
    return right_linear(x.roll(1, -1), weight)


def _select(x: torch.Tensor, step: Step) -> torch.Tensor:
    return x[: len(step.input.logits_rows)]


def _backend(**operators: Callable[..., Any]) -> Callable[[], Backend]:
    return lambda: TableBackend("cpu", operators)


silu_and_mul = _backend(silu_and_mul=_silu, rms_norm=right_norm)
rms_norm = _backend(rms_norm=_norm, silu_and_mul=right_silu)
sgmv = _backend(sgmv=_sgmv, rms_norm=right_norm)
linear = _backend(linear=_linear)
select_rows = _backend(select_rows=_select, silu_and_mul=right_silu)
right = _backend(silu_and_mul=right_silu, rms_norm=right_norm)
