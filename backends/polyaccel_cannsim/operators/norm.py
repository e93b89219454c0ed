"""Normalisation: aclnnRmsNorm, aclnnAddRmsNorm, aclnnLayerNorm.

"RmsNorm", "AddRmsNorm", "LayerNorm" below: hicann/ops-nn norm/rms_norm/docs/aclnnRmsNorm.md,
norm/add_rms_norm/docs/aclnnAddRmsNorm.md, norm/layer_norm_v4/docs/aclnnLayerNorm&aclnnLayerNormWithImplMode.md.
All operands may be strided (column "non-contiguous" is ticked in the three pages).
"""

from __future__ import annotations

import torch

from .descriptor import (
    FLOATS,
    Tensor,
    require,
    require_dtype,
    require_plain,
    require_rank,
    require_same_dtype,
    require_shape,
    store,
    wide,
)
from .environment import CHIP_310P, Environment
from .operator import Compute, aclnn
from .refusal import invalid, tiling

RMS_NORM = "hicann/ops-nn norm/rms_norm/docs/aclnnRmsNorm.md"
ADD_RMS_NORM = "hicann/ops-nn norm/add_rms_norm/docs/aclnnAddRmsNorm.md"
LAYER_NORM = "hicann/ops-nn norm/layer_norm_v4/docs/aclnnLayerNorm&aclnnLayerNormWithImplMode.md"

_MIXED = {  # RmsNorm, table of data types: gamma may stay in float32 except on 310P
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.float32),
}
_MIN_BYTES_310P = 32  # RmsNorm, constraints: on 310P the last axis holds at least 32 bytes


def _normed_axes(x: Tensor, gamma: Tensor) -> int:
    axes = len(gamma.shape)
    if not gamma.shape or axes > len(x.shape) or x.shape[len(x.shape) - axes :] != gamma.shape or 0 in gamma.shape:
        # RmsNorm, gamma: "gamma_shape = x_shape[n:]", "no empty tensor"; a tiling rule (561002), Meta kernels miss it.
        raise tiling(f"gamma shape {list(gamma.shape)} must equal the last axes of x, whose shape is {list(x.shape)}.")
    return axes


def _rstd_shape(x: Tensor, axes: int) -> tuple[int, ...]:
    return (*x.shape[: len(x.shape) - axes], *([1] * axes))


def _rms(values: torch.Tensor, axes: int, epsilon: float) -> torch.Tensor:
    dims = tuple(range(-axes, 0))
    return torch.rsqrt(values.pow(2).mean(dims, keepdim=True) + epsilon)


@aclnn("aclnnRmsNorm", "2*tensor double 2*tensor", serves="npu_rms_norm", document=RMS_NORM)
def rms_norm(environment: Environment, x: Tensor, gamma: Tensor, epsilon: float, y: Tensor, rstd: Tensor) -> Compute:
    """y = x / sqrt(mean(x^2) + epsilon) * gamma, and rstd in float32. x: [..., *gamma.shape]."""
    require(x=x, gamma=gamma, yOut=y, rstdOut=rstd)
    require_plain(x=x, gamma=gamma)
    # RmsNorm, note on 310P: x, gamma and y are never BFLOAT16.
    allowed = FLOATS[:2] if environment.chip == CHIP_310P else FLOATS
    require_dtype("x", x, allowed)
    require_dtype("gamma", gamma, allowed)
    require_dtype("rstdOut", rstd, (torch.float32,))
    if x.dtype != gamma.dtype and ((x.dtype, gamma.dtype) not in _MIXED or environment.chip == CHIP_310P):
        raise invalid(f"x of {x.dtype} and gamma of {gamma.dtype} are no supported combination.")
    require_same_dtype(yOut=y, x=x)
    require_rank("x", x, 1, 8)
    axes = _normed_axes(x, gamma)
    if environment.chip == CHIP_310P and x.shape[-1] * x.dtype.itemsize < _MIN_BYTES_310P:
        raise tiling(f"the last axis of x must hold at least {_MIN_BYTES_310P} bytes on this chip.")
    require_shape("yOut", y, x.shape)
    require_shape("rstdOut", rstd, _rstd_shape(x, axes))

    def compute() -> None:
        values = wide(x)
        scale = _rms(values, axes, epsilon)
        store(rstd, scale)
        store(y, values * scale * wide(gamma))

    return compute


@aclnn("aclnnAddRmsNorm", "3*tensor double 3*tensor", serves="npu_add_rms_norm", document=ADD_RMS_NORM)
def add_rms_norm(
    environment: Environment,
    x1: Tensor,
    x2: Tensor,
    gamma: Tensor,
    epsilon: float,
    y: Tensor,
    rstd: Tensor | None,
    x: Tensor | None,
) -> Compute:
    """x = x1 + x2, rounded; y = rms_norm(x) * gamma. The norm reads the unrounded sum."""
    require(x1=x1, x2=x2, gamma=gamma, yOut=y)
    if rstd is not None and x is None:
        require(xOut=x)  # AddRmsNorm, return values: rstdOut without xOut is 161001
    require_plain(x1=x1, x2=x2, gamma=gamma)
    # AddRmsNorm, note on 310P: no BFLOAT16; table of combinations: one data type for all of them.
    require_dtype("x1", x1, FLOATS[:2] if environment.chip == CHIP_310P else FLOATS)
    require_same_dtype(x1=x1, x2=x2, gamma=gamma, yOut=y, xOut=x)
    require_dtype("rstdOut", rstd, (torch.float32,))
    if epsilon < 0:
        raise invalid(f"epsilon must not be negative, but is {epsilon}.")  # AddRmsNorm, epsilon
    require_rank("x1", x1, 1, 8)
    require_shape("x2", x2, x1.shape)
    axes = _normed_axes(x1, gamma)
    require_shape("yOut", y, x1.shape)
    require_shape("xOut", x, x1.shape)
    require_shape("rstdOut", rstd, _rstd_shape(x1, axes))

    def compute() -> None:
        total = wide(x1) + wide(x2)
        scale = _rms(total, axes, epsilon)
        normed = total * scale * wide(gamma)
        if x is not None:
            store(x, total)
        if rstd is not None and environment.chip != CHIP_310P:  # AddRmsNorm: on 310P rstdOut is not written
            store(rstd, scale)
        store(y, normed)

    return compute


@aclnn("aclnnLayerNorm", "tensor ints 2*tensor double 3*tensor", serves="native_layer_norm", document=LAYER_NORM)
def layer_norm(
    environment: Environment,
    x: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    epsilon: float,
    out: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
) -> Compute:
    """(x - mean) / sqrt(var + epsilon) * weight + bias over the last len(normalized_shape) axes."""
    require(input=x, out=out)
    require_dtype("input", x, FLOATS)
    require_same_dtype(input=x, out=out)
    # LayerNorm, weight and bias: the type of the input or FLOAT, both alike where both are given.
    require_dtype("weightOptional", weight, (x.dtype, torch.float32))
    require_dtype("biasOptional", bias, (x.dtype, torch.float32))
    require_same_dtype(weightOptional=weight, biasOptional=bias)
    require_rank("input", x, 1, 8)
    axes = len(normalized_shape or ())
    if axes < 1:
        raise invalid("normalizedShape must have at least one dimension.")
    if x.shape[-axes:] != tuple(normalized_shape):
        raise invalid(f"normalizedShape {list(normalized_shape)} must equal the last axes of {list(x.shape)}.")
    require_shape("weightOptional", weight, normalized_shape)
    require_shape("biasOptional", bias, normalized_shape)
    require_shape("out", out, x.shape)

    def compute() -> None:
        values = wide(x)
        dims = tuple(range(-axes, 0))
        centre = values.mean(dims, keepdim=True)
        scale = torch.rsqrt((values - centre).pow(2).mean(dims, keepdim=True) + epsilon)
        result = (values - centre) * scale
        if weight is not None:
            result = result * wide(weight)
        if bias is not None:
            result = result + wide(bias)
        for target, statistic in ((mean, centre), (rstd, scale)):
            if target is not None and target.shape:
                store(target, statistic)
        store(out, result)

    return compute


OPERATORS = (rms_norm, add_rms_norm, layer_norm)
