"""Operators that make values or join tensors: fill, zero, one, arange, cat.

Documents: hicann/ops-math conversion/ and math/, the page named in each row.
"""

from __future__ import annotations

import math

import torch

from .descriptor import ALL, FLOATS, Tensor, require, require_dtype, require_rank, store
from .environment import CHIP_310P, Environment
from .operator import Compute, aclnn
from .refusal import invalid, null

_ARANGE = (*FLOATS, torch.float64, torch.int32, torch.int64)  # aclnnArange, out


def _types(environment: Environment, allowed: tuple[torch.dtype, ...]) -> tuple[torch.dtype, ...]:
    if environment.chip == CHIP_310P:
        return tuple(dtype for dtype in allowed if dtype != torch.bfloat16)
    return allowed


@aclnn(
    "aclnnInplaceFillScalar",
    "tensor number",
    serves="fill_, full, masked constants",
    document="hicann/ops-math conversion/fill/docs/aclnnInplaceFillScalar.md",
)
def inplace_fill_scalar(environment: Environment, x: Tensor, value: float) -> Compute:
    """x = value."""
    require(selfRef=x)
    require_dtype("selfRef", x, _types(environment, ALL))

    def compute() -> None:
        x.view().fill_(value)

    return compute


@aclnn(
    "aclnnInplaceFillTensor",
    "2*tensor",
    serves="fill_ by a tensor",
    document="hicann/ops-math conversion/fill/docs/aclnnInplaceFillTensor.md",
)
def inplace_fill_tensor(environment: Environment, x: Tensor, value: Tensor) -> Compute:
    """x = value, which has one element."""
    require(selfRef=x, value=value)
    require_dtype("selfRef", x, _types(environment, ALL))
    if len(value.shape) > 1 or math.prod(value.shape) != 1:
        raise invalid(f"value must have one element and at most one dimension, but its shape is {list(value.shape)}.")

    def compute() -> None:
        x.view().copy_(value.view().reshape(()))

    return compute


@aclnn(
    "aclnnInplaceZero",
    "tensor",
    serves="zeros, zero_",
    document="hicann/ops-math math/zero_op/docs/aclnnInplaceZero.md",
)
def inplace_zero(environment: Environment, x: Tensor) -> Compute:
    """x = 0."""
    require(selfRef=x)
    require_dtype("selfRef", x, _types(environment, ALL))

    def compute() -> None:
        x.view().zero_()

    return compute


@aclnn("aclnnInplaceOne", "tensor", serves="ones", document="hicann/ops-math math/ones_like/docs/aclnnInplaceOne.md")
def inplace_one(environment: Environment, x: Tensor) -> Compute:
    """x = 1."""
    require(selfRef=x)
    require_dtype("selfRef", x, _types(environment, ALL))

    def compute() -> None:
        x.view().fill_(1)

    return compute


@aclnn("aclnnArange", "3*number tensor", serves="arange", document="hicann/ops-math math/range/docs/aclnnArange.md")
def arange(environment: Environment, start: float, end: float, step: float, out: Tensor) -> Compute:
    """out = start, start + step, ... below end."""
    require(out=out)
    require_dtype("out", out, _types(environment, _ARANGE))
    if step == 0 or (end - start) / step < 0:
        raise invalid(f"step {step} does not lead from start {start} to end {end}.")
    size = math.ceil((end - start) / step)
    if out.shape != (size,):
        raise invalid(f"Expected out to have {size} elements, but its shape is {list(out.shape)}.")

    def compute() -> None:
        values = torch.arange(size, dtype=torch.int64 if isinstance(step, int) else torch.float64)
        store(out, values * step + start)

    return compute


@aclnn(
    "aclnnCat",
    "tensors int64 tensor",
    serves="cat, stack",
    document="hicann/ops-math conversion/concat_d/docs/aclnnCat.md",
)
def cat(environment: Environment, tensors: tuple[Tensor, ...], dim: int, out: Tensor) -> Compute:
    """The tensors one after another along `dim`; types are promoted to out's."""
    require(out=out)
    if not tensors:
        raise null("tensors")
    for i, tensor in enumerate(tensors):
        require_dtype(f"tensors[{i}]", tensor, _types(environment, ALL))
        require_rank(f"tensors[{i}]", tensor, 1, 8)
    filled = [tensor for tensor in tensors if tensor.shape != (0,)]  # aclnnCat: an empty 1-D tensor is skipped
    if filled:
        axes = len(filled[0].shape)
        if not -axes <= dim < axes:
            raise invalid(f"dim {dim} is out of range [{-axes}, {axes - 1}].")
        shape = list(filled[0].shape)
        shape[dim] = 0
        for tensor in filled:
            if len(tensor.shape) != axes or any(
                size != shape[i] for i, size in enumerate(tensor.shape) if i != dim % axes
            ):
                raise invalid(
                    f"tensors of shapes {[list(one.shape) for one in tensors]} can not be joined along {dim}."
                )
            shape[dim] += tensor.shape[dim]
        if out.shape != tuple(shape):
            raise invalid(f"Expected out to have shape {shape}, but got {list(out.shape)}.")

    def compute() -> None:
        if filled:
            store(out, torch.cat([tensor.view().to(out.dtype) for tensor in filled], dim))

    return compute


@aclnn(
    "aclnnConstantPadNd",
    "tensor ints number tensor",
    serves="constant_pad_nd (ProcessGroupHCCL pads small buffers with it)",
    document="hicann/ops-math conversion/pad_v3/docs/aclnnConstantPadNd.md",
)
def constant_pad_nd(environment: Environment, x: Tensor, pad: tuple[int, ...], value: float, out: Tensor) -> Compute:
    """x with `value` added before and after its axes, last axis first: pad = (before, after, before, after, ...)."""
    require(self=x, out=out)
    require_dtype("self", x, _types(environment, ALL))
    if len(pad) % 2 or len(pad) // 2 > len(x.shape):
        raise invalid(
            f"pad {list(pad)} must have an even number of values, at most two for each axis of {list(x.shape)}."
        )
    shape = list(x.shape)
    for i in range(len(pad) // 2):
        shape[-1 - i] += pad[2 * i] + pad[2 * i + 1]
    if out.shape != tuple(shape) or min(shape, default=0) < 0:
        raise invalid(f"Expected out to have shape {shape}, but got {list(out.shape)}.")
    return lambda: store(out, torch.constant_pad_nd(x.view(), list(pad), value))


OPERATORS = (constant_pad_nd, inplace_fill_scalar, inplace_fill_tensor, inplace_zero, inplace_one, arange, cat)
