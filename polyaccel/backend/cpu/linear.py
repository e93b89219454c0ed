"""Products with packed weights."""

from __future__ import annotations

import torch
from torch.nn.functional import linear as plain_linear

from polyaccel.backend.composite.linear import linear as composite_linear
from polyaccel.backend.composite.tiles import whole_tiles
from polyaccel.backend.cpu.weight import PackedWeight
from polyaccel.backend.errors import OperatorError
from polyaccel.backend.weight import Weight


def check_rows(operator: str, x: torch.Tensor, weight: Weight) -> PackedWeight:
    """The weight as this backend's own, once ``x: [T, k]`` is known to fit it.

    Raises:
        OperatorError: another weight class, a weight with experts, another dtype or width.
    """
    if not isinstance(weight, PackedWeight):
        found = type(weight).__name__
        raise OperatorError(operator, f"takes weights of the cpu backend, not {found} of {weight.spec.site!r}")
    spec = weight.spec
    if spec.experts is not None:
        raise OperatorError(operator, f"weight {spec.site!r} has {spec.experts} experts; use moe_experts")
    if x.dim() != 2 or x.dtype != spec.dtype or x.shape[1] != spec.k:
        raise OperatorError.describe(operator, f"weight {spec.site!r} takes {spec.dtype} rows of {spec.k}", {"x": x})
    return weight


def multiply(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """``x @ W.T + bias`` for contiguous ``x: [T, k]``; returns a new ``[T, n]``."""
    packed = weight.packed
    if packed is not None:
        return packed.multiply(x, weight.bias)
    if weight.quantised is not None:
        return composite_linear(x, weight)
    rows, matrix = whole_tiles(x, weight.tensor, axis=-1)
    return plain_linear(rows, matrix, weight.bias)


def multiply_add(x: torch.Tensor, weight: PackedWeight, residual: torch.Tensor) -> torch.Tensor:
    """``x @ W.T + bias + residual``, rounded once; ``residual: [T, n]`` is contiguous and left as it is."""
    packed = weight.packed
    if packed is not None and x.shape[0]:
        return packed.multiply_add(x, weight.bias, residual)
    return multiply(x, weight).add_(residual)
