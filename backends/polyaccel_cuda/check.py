"""What kernels take: operands are refused here, before anything reaches the device."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from polyaccel.backend import KVCache, OperatorError, Weight
from polyaccel.backend.composite.weight import TensorWeight
from polyaccel.backend.spec import FLOATS
from polyaccel_cuda.kv_cache import BlockMajorKVCache
from polyaccel_cuda.weight import FoldedWeight


def folded(operator: str, weight: Weight) -> FoldedWeight:
    """The weight as this backend's own.

    Raises:
        OperatorError: it is another backend's, quantised, of experts or a table.
    """
    if not isinstance(weight, FoldedWeight):
        raise OperatorError(operator, f"takes a plain weight of the cuda backend, not {weight.spec}")
    return weight


def plain(operator: str, weight: Weight) -> TensorWeight:
    """A weight stored as plain or quantised tensors, of one matrix."""
    if not isinstance(weight, TensorWeight) or weight.spec.experts is not None:
        raise OperatorError(operator, f"takes one matrix of the cuda backend, not {weight.spec}")
    return weight


def table(operator: str, weight: Weight) -> torch.Tensor:
    """An embedding table's storage."""
    return plain(operator, weight).tensor


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
    """Refuse operands whose last dimensions or dtypes differ."""
    floats(operator, **operands)
    given = {name: x for name, x in operands.items() if x is not None}
    if len({(x.shape[-1], x.dtype) for x in given.values()}) > 1:
        raise OperatorError.describe(operator, f"{' and '.join(given)} are not of one width and dtype", given)


def cache(operator: str, kv: KVCache, **heads: torch.Tensor) -> BlockMajorKVCache:
    """The cache as this backend's own; refuses heads that do not fit it."""
    if not isinstance(kv, BlockMajorKVCache):
        raise OperatorError(operator, f"takes a cache of the cuda backend, not {type(kv).__name__}")
    for name, x in heads.items():
        if x.dim() != 3 or x.shape[2] != kv.spec.head_dim or x.dtype != kv.spec.dtype:
            raise OperatorError.describe(
                operator, f"{name} must be {kv.spec.dtype} heads of {kv.spec.head_dim}", {name: x}
            )
    return kv
