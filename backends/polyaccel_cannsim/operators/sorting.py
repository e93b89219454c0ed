"""Sorting: aclnnSort, aclnnTopk.

"Sort", "Topk" below: hicann/ops-math math/sort/docs/aclnnSort.md, math/topk/docs/aclnnTopk.md.
"""

from __future__ import annotations

import torch

from .descriptor import ALL, NUMBERS, Tensor, require, require_dtype, require_rank, store
from .environment import CHIP_310P, Environment
from .operator import Compute, aclnn
from .refusal import invalid

SORT = "hicann/ops-math math/sort/docs/aclnnSort.md"
TOPK = "hicann/ops-math math/topk/docs/aclnnTopk.md"


def _check(
    environment: Environment, x: Tensor, dim: int, values: Tensor, indices: Tensor, types: tuple[torch.dtype, ...]
) -> None:
    require(self=x, valuesOut=values, indicesOut=indices)
    if environment.chip == CHIP_310P:
        types = tuple(dtype for dtype in types if dtype != torch.bfloat16)
    require_dtype("self", x, types)
    require_dtype("valuesOut", values, (x.dtype,))
    require_dtype("indicesOut", indices, (torch.int64,))
    require_rank("self", x, 0, 8)
    axes = max(len(x.shape), 1)
    if not -axes <= dim < axes:
        raise invalid(f"dim {dim} is out of range [{-axes}, {axes - 1}].")


def _require_out(shape: tuple[int, ...], **outs: Tensor) -> None:
    for name, out in outs.items():
        if out.shape != shape:
            raise invalid(f"Expected {name} to have shape {list(shape)}, but got {list(out.shape)}.")


@aclnn("aclnnSort", "tensor bool int64 bool 2*tensor", serves="sort", document=SORT)
def sort(
    environment: Environment, x: Tensor, stable: bool, dim: int, descending: bool, values: Tensor, indices: Tensor
) -> Compute:
    """x sorted along `dim`. Equal values keep their order even where `stable` is false, which promises nothing."""
    _check(environment, x, dim, values, indices, ALL)
    _require_out(x.shape, valuesOut=values, indicesOut=indices)

    def compute() -> None:
        found = torch.sort(x.view(), dim=dim, descending=descending, stable=True)
        store(values, found.values)
        store(indices, found.indices)

    return compute


@aclnn("aclnnTopk", "tensor 2*int64 2*bool 2*tensor", serves="topk", document=TOPK)
def topk(
    environment: Environment,
    x: Tensor,
    k: int,
    dim: int,
    largest: bool,
    ordered: bool,
    values: Tensor,
    indices: Tensor,
) -> Compute:
    """The k largest (or smallest) values along `dim` and their indices; among equal ones the lowest index first."""
    _check(environment, x, dim, values, indices, NUMBERS)
    size = x.shape[dim] if x.shape else 1
    if not 0 <= k <= size:
        raise invalid(f"k {k} is out of range [0, {size}].")  # Topk, k
    shape = list(x.shape)
    if shape:
        shape[dim] = k
    _require_out(tuple(shape), valuesOut=values, indicesOut=indices)

    def compute() -> None:
        if not x.shape:
            store(values, x.view())
            store(indices, torch.zeros((), dtype=torch.int64))
            return
        found = torch.sort(x.view(), dim=dim, descending=largest, stable=True)
        store(values, found.values.narrow(dim, 0, k))
        store(indices, found.indices.narrow(dim, 0, k))

    return compute


OPERATORS = (sort, topk)
