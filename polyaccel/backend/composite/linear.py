"""``linear`` and ``dequantize`` on :class:`TensorWeight`: the mandatory operators, for backends with that class."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from polyaccel.backend.composite.tiles import whole_tiles
from polyaccel.backend.composite.weight import QuantisedTensors, TensorWeight, unpack_codes
from polyaccel.backend.errors import OperatorError
from polyaccel.backend.weight import Weight, WeightSpec

_DEQUANTISE = ("aten::bitwise_and", "aten::__rshift__", "aten::stack", "aten::sub", "aten::mul")
EVIDENCE: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "linear": ("aten::linear", "aten::addmm", "aten::mm", "aten::constant_pad_nd", *_DEQUANTISE),
        "dequantize": _DEQUANTISE,
    }
)
"""Torch operators that the two may execute, for backends whose own forms they are."""


def linear(x: torch.Tensor, weight: Weight) -> torch.Tensor:
    """``x @ W.T + bias``, ``[tokens, n]``, for ``x: [tokens, k]`` of the weight's dtype. No tokens and k = 0 are fine.

    Raises:
        OperatorError: another dtype or width, a weight with experts, or a Weight class that is not TensorWeight.
    """
    stored = _tensor_weight("linear", weight)
    spec = stored.spec
    if spec.experts is not None:
        raise OperatorError("linear", f"weight {spec.site!r} has {spec.experts} experts; use moe_experts")
    if x.dtype != spec.dtype or x.shape[-1] != spec.k:
        raise OperatorError.describe("linear", f"weight {spec.site!r} takes {spec.dtype} rows of {spec.k}", {"x": x})
    rows, matrix = whole_tiles(x, dequantize(stored), axis=-1)
    return torch.nn.functional.linear(rows, matrix, stored.bias)


def dequantize(weight: Weight) -> torch.Tensor:
    """The weight as a plain tensor ``[n, k]`` (``[experts, n, k]``): for a float weight its storage, not a copy.

    Raises:
        OperatorError: a Weight class that is not TensorWeight.
    """
    stored = _tensor_weight("dequantize", weight)
    return stored.tensor if stored.quantised is None else dequantize_canonical(stored.quantised, stored.spec)


def dequantize_experts(weight: TensorWeight, experts: torch.Tensor) -> torch.Tensor:
    """Copies ``[m, n, k]`` of the ``experts: [m]`` (int64 on the device), quantised ones as dequantised."""
    if weight.quantised is None:
        return weight.tensor.index_select(0, experts)
    return dequantize_canonical(weight.quantised.select(experts), weight.spec)


def dequantize_canonical(quantised: QuantisedTensors, spec: WeightSpec) -> torch.Tensor:
    """``(q - z) * s``: integer subtract, float32 multiply, one rounding to the weight's dtype."""
    quantisation = spec.quantisation
    if quantisation is None:
        raise OperatorError("dequantize", f"weight {spec.site!r} is not quantised")
    size, k = min(quantisation.group_size, spec.k), spec.k
    codes = unpack_codes(quantised.codes, quantisation.bits, k).to(torch.int16)
    zeros = quantised.zeros.to(torch.int16).repeat_interleave(size, dim=-1)[..., :k]
    scales = quantised.scales.float().repeat_interleave(size, dim=-1)[..., :k]
    return ((codes - zeros).float() * scales).to(spec.dtype)


def _tensor_weight(operator: str, weight: Weight) -> TensorWeight:
    if not isinstance(weight, TensorWeight):
        raise OperatorError(
            operator,
            f"the plain-torch form takes TensorWeight, not {type(weight).__name__} of {weight.spec.site!r}; a backend "
            f"with its own Weight class brings its own {operator}",
        )
    return weight
