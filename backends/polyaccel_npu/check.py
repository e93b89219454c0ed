"""What operators take: operands are refused here, before anything reaches the device."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from polyaccel.backend import KVCache, OperatorError, Weight
from polyaccel.backend.composite.weight import TensorWeight
from polyaccel.backend.spec import FLOATS
from polyaccel_npu.kv_cache import BlockKVCache


def plain(operator: str, weight: Weight) -> TensorWeight:
    """A float weight of one matrix, stored as a plain tensor.

    Raises:
        OperatorError: it is another backend's, quantised, or of experts.
    """
    if not isinstance(weight, TensorWeight) or weight.spec.experts is not None or weight.quantised is not None:
        raise OperatorError(operator, f"takes one float matrix of the npu backend, not {weight.spec}")
    return weight


def rows(operator: str, name: str, x: torch.Tensor, weight: Weight, width: int) -> None:
    """Refuse ``x`` unless it is rows of ``width`` in the weight's dtype."""
    spec = weight.spec
    if x.dim() != 2 or x.shape[1] != width or x.dtype != spec.dtype:
        raise OperatorError.describe(operator, f"{spec.site!r} takes {spec.dtype} rows of {width}", {name: x})


def floats(operator: str, **operands: torch.Tensor | None) -> None:
    """Refuse operands of a dtype that is no activation's."""
    given = {name: x for name, x in operands.items() if x is not None}
    if any(x.dtype not in FLOATS for x in given.values()):
        raise OperatorError.describe(operator, f"takes {', '.join(map(str, FLOATS))}", given)


def same_width(operator: str, operands: Mapping[str, torch.Tensor | None]) -> None:
    """Refuse operands whose last dimensions or dtypes differ: CANN reads a short gamma beyond its end."""
    floats(operator, **operands)
    given = {name: x for name, x in operands.items() if x is not None}
    if len({(x.shape[-1], x.dtype) for x in given.values()}) > 1:
        raise OperatorError.describe(operator, f"{' and '.join(given)} are not of one width and dtype", given)


def cache(operator: str, kv: KVCache, **heads: torch.Tensor) -> BlockKVCache:
    """The cache as this backend's own; refuses heads that do not fit it."""
    if not isinstance(kv, BlockKVCache):
        raise OperatorError(operator, f"takes a cache of the npu backend, not {type(kv).__name__}")
    for name, x in heads.items():
        if x.dim() != 3 or x.shape[2] != kv.spec.head_dim or x.dtype != kv.spec.dtype:
            raise OperatorError.describe(
                operator, f"{name} must be {kv.spec.dtype} heads of {kv.spec.head_dim}", {name: x}
            )
    return kv
