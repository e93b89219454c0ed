"""Operators along an axis: softmax, sums, maxima.

Documents: hicann/ops-math math/ and hicann/ops-nn activation/, the page named in each row. Operands may be strided.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .descriptor import ALL, FLOATS, INDICES, NUMBERS, Tensor, require, require_dtype, require_rank, store
from .environment import CHIP_310P, Environment
from .operator import Compute, Operator, aclnn
from .refusal import invalid

_DOUBLED = (*FLOATS, torch.float64)


def _types(environment: Environment, allowed: tuple[torch.dtype, ...]) -> tuple[torch.dtype, ...]:
    if environment.chip == CHIP_310P:
        return tuple(dtype for dtype in allowed if dtype != torch.bfloat16)
    return allowed


def _values(x: Tensor) -> torch.Tensor:
    values = x.view()
    return values.to(torch.float32) if values.dtype in (torch.float16, torch.bfloat16) else values


def _check_dim(x: Tensor, dim: int) -> None:
    axes = max(len(x.shape), 1)
    if not -axes <= dim < axes:
        raise invalid(f"dim {dim} is out of range [{-axes}, {axes - 1}].")


def _reduced(x: Tensor, dims: Sequence[int], keep: bool) -> tuple[int, ...]:
    axes = {dim % max(len(x.shape), 1) for dim in dims} or set(range(len(x.shape)))
    return tuple(1 if i in axes else size for i, size in enumerate(x.shape) if keep or i not in axes)


def _require_shape(name: str, out: Tensor, shape: tuple[int, ...]) -> None:
    if out.shape != shape:
        raise invalid(f"Expected {name} to have shape {list(shape)}, but got {list(out.shape)}.")


def _softmax_row(name: str, serves: str, document: str, logarithm: bool) -> Operator:
    @aclnn(name, "tensor int64 tensor", serves=serves, document=document)
    def row(environment: Environment, x: Tensor, dim: int, out: Tensor) -> Compute:
        require(self=x, out=out)
        for label, tensor in (("self", x), ("out", out)):
            require_dtype(label, tensor, _types(environment, _DOUBLED))
        require_rank("self", x, 0, 8)
        _check_dim(x, dim)
        _require_shape("out", out, x.shape)
        function = torch.log_softmax if logarithm else torch.softmax
        return lambda: store(out, function(_values(x), dim))

    return row


softmax = _softmax_row("aclnnSoftmax", "softmax", "hicann/ops-nn activation/softmax_v2/docs/aclnnSoftmax.md", False)
log_softmax = _softmax_row(
    "aclnnLogSoftmax", "log_softmax", "hicann/ops-nn activation/log_softmax_v2/docs/aclnnLogSoftmax.md", True
)


@aclnn(
    "aclnnReduceSum",
    "tensor ints bool dtype tensor",
    serves="sum",
    document="hicann/ops-math math/reduce_sum/docs/aclnnReduceSum.md",
)
def reduce_sum(
    environment: Environment, x: Tensor, dims: tuple[int, ...], keep: bool, dtype: torch.dtype, out: Tensor
) -> Compute:
    """The sum over `dims` (all when empty), in `dtype`, which is out's."""
    require(self=x, out=out)
    require_dtype("self", x, _types(environment, ALL))
    if dtype != out.dtype:
        raise invalid(f"dtype {dtype} must be the data type of out, {out.dtype}.")
    for dim in dims or ():
        _check_dim(x, dim)
    _require_shape("out", out, _reduced(x, dims or (), keep))

    def compute() -> None:
        values = x.view()
        wide = torch.float64 if dtype == torch.float64 else torch.float32 if dtype.is_floating_point else torch.int64
        store(out, values.to(wide).sum(tuple(dims) if dims else tuple(range(values.ndim)), keepdim=keep))

    return compute


@aclnn(
    "aclnnCumsum",
    "tensor int64 dtype tensor",
    serves="cumsum",
    document="hicann/ops-math math/cumsum/docs/aclnnCumsum.md",
)
def cumsum(environment: Environment, x: Tensor, dim: int, dtype: torch.dtype, out: Tensor) -> Compute:
    """Running sums along `dim`, in `dtype`, which is out's."""
    require(self=x, out=out)
    require_dtype("self", x, _types(environment, (*NUMBERS, torch.bool)))
    if dtype != out.dtype:
        raise invalid(f"dtype {dtype} must be the data type of out, {out.dtype}.")
    _check_dim(x, dim)
    _require_shape("out", out, x.shape)

    def compute() -> None:
        half = dtype in (torch.float16, torch.bfloat16)
        store(out, torch.cumsum(x.view(), dim, dtype=torch.float32 if half else dtype))

    return compute


@aclnn(
    "aclnnArgMax",
    "tensor int64 bool tensor",
    serves="argmax",
    document="hicann/ops-math math/arg_max_v2/docs/aclnnArgMax.md",
)
def arg_max(environment: Environment, x: Tensor, dim: int, keep: bool, out: Tensor) -> Compute:
    """The index of the largest value along `dim`; of equal ones the first."""
    require(self=x, out=out)
    require_dtype("self", x, _types(environment, NUMBERS))
    require_dtype("out", out, INDICES)
    _check_dim(x, dim)
    if x.shape and x.shape[dim] == 0:
        raise invalid(f"dim {dim} of self must not be empty: {list(x.shape)}.")
    _require_shape("out", out, _reduced(x, (dim,), keep) if x.shape else ())
    return lambda: store(out, _first_extreme(_values(x), dim, keep)[1])


def _first_extreme(values: torch.Tensor, dim: int, keep: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest value along `dim` and its lowest index (NaN counts as largest, as in torch)."""
    if values.ndim == 0:
        return values, torch.zeros((), dtype=torch.int64)
    top = torch.amax(values, dim, keepdim=True)
    hit = (values == top) | (values != values)
    index = hit.to(torch.uint8).argmax(dim, keepdim=True)
    return (top, index) if keep else (top.squeeze(dim), index.squeeze(dim))


@aclnn(
    "aclnnMaxDim",
    "tensor int64 bool 2*tensor",
    serves="max along an axis",
    document="hicann/ops-math math/arg_max_with_value/docs/aclnnMaxDim.md",
)
def max_dim(environment: Environment, x: Tensor, dim: int, keep: bool, out: Tensor, indices: Tensor) -> Compute:
    """The largest value along `dim` and its index; of equal ones the first."""
    require(self=x, out=out, indices=indices)
    require_dtype("self", x, _types(environment, (*FLOATS, torch.int32, torch.int64, torch.bool)))
    require_dtype("indices", indices, INDICES)
    _check_dim(x, dim)
    shape = _reduced(x, (dim,), keep) if x.shape else ()
    _require_shape("out", out, shape)
    _require_shape("indices", indices, shape)

    def compute() -> None:
        value, index = _first_extreme(_values(x), dim, keep)
        store(out, value)
        store(indices, index)

    return compute


@aclnn("aclnnMax", "2*tensor", serves="max", document="hicann/ops-math math/reduce_max/docs/aclnnMax.md")
def max_all(environment: Environment, x: Tensor, out: Tensor) -> Compute:
    """The largest value of all."""
    require(self=x, out=out)
    require_dtype("self", x, _types(environment, ALL))
    _require_shape("out", out, ())
    return lambda: store(out, x.view().max())


@aclnn(
    "aclnnAmax", "tensor ints bool tensor", serves="amax", document="hicann/ops-math math/reduce_max/docs/aclnnAmax.md"
)
def amax(environment: Environment, x: Tensor, dims: tuple[int, ...], keep: bool, out: Tensor) -> Compute:
    """The largest value over `dims` (all when empty)."""
    require(self=x, out=out)
    require_dtype("self", x, _types(environment, ALL))
    for dim in dims or ():
        _check_dim(x, dim)
    _require_shape("out", out, _reduced(x, dims or (), keep))
    return lambda: store(out, torch.amax(x.view(), tuple(dims or ()), keepdim=keep))


OPERATORS = (softmax, log_softmax, reduce_sum, cumsum, arg_max, max_dim, max_all, amax)
