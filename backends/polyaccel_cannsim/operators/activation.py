"""Activations: aclnnSwiGlu, aclnnGelu, aclnnGeluV2.

The plain ones (silu, sigmoid, tanh) are rows of elementwise.py.
"""

from __future__ import annotations

import math

import torch

from .descriptor import (
    FLOATS,
    Tensor,
    require,
    require_contiguous,
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

SWIGLU = "hicann/ops-nn activation/swi_glu/docs/aclnnSwiGlu.md"
GELU = "hicann/ops-nn activation/gelu/docs/aclnnGelu.md"
GELU_V2 = "hicann/ops-nn activation/gelu_v2/docs/aclnnGeluV2.md"

_ALIGN_310P = 64  # SwiGlu, note on 310P: the shape is a multiple of 64 bytes


@aclnn("aclnnSwiGlu", "tensor int64 tensor", serves="npu_swiglu", document=SWIGLU)
def swiglu(environment: Environment, x: Tensor, dim: int, out: Tensor) -> Compute:
    """silu(a) * b with a, b = the two halves of x along `dim`."""
    require(x=x, out=out)
    require_plain(x=x, out=out)
    require_dtype("x", x, FLOATS[:2] if environment.chip == CHIP_310P else FLOATS)
    require_same_dtype(x=x, out=out)
    require_contiguous(x=x, out=out)  # SwiGlu: a cross under "non-contiguous" for x and out
    if not x.shape or not -len(x.shape) <= dim < len(x.shape):
        raise invalid(f"dim {dim} is out of range [{-len(x.shape)}, {len(x.shape) - 1}].")
    if x.shape[dim] % 2:
        # SwiGlu, x: "even along dim"; torch_npu's Meta kernel lets an odd width pass.
        raise tiling(f"the size of x along dim {dim} must be even, but the shape is {list(x.shape)}.")
    half = list(x.shape)
    half[dim] //= 2
    require_shape("out", out, half)
    if environment.chip == CHIP_310P and (0 in x.shape or half[-1] * x.dtype.itemsize % _ALIGN_310P):
        raise tiling(f"x must not be empty and must be aligned to {_ALIGN_310P} bytes on this chip: {list(x.shape)}.")

    def compute() -> None:
        gate, up = wide(x).chunk(2, dim)
        store(out, torch.nn.functional.silu(gate) * up)

    return compute


def _check_gelu(environment: Environment, x: Tensor, out: Tensor) -> None:
    require(self=x, out=out)
    # Gelu, GeluV2: FLOAT, FLOAT16, BFLOAT16; on 310P no BFLOAT16; both operands alike in type and shape, at most 8-D.
    require_dtype("self", x, FLOATS[:2] if environment.chip == CHIP_310P else FLOATS)
    require_same_dtype(self=x, out=out)
    require_rank("self", x, 0, 8)
    require_shape("out", out, x.shape)


def _tanh_gelu(values: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(values, approximate="tanh")


def _exact_gelu(values: torch.Tensor) -> torch.Tensor:
    """As the page has it; torch's own kernel for the CPU has a coarser erf and makes NaN of infinity."""
    return 0.5 * values * (1 + torch.erf(values * math.sqrt(0.5)))


@aclnn("aclnnGelu", "2*tensor", serves="gelu", document=GELU)
def gelu(environment: Environment, x: Tensor, out: Tensor) -> Compute:
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), the only formula of the page.

    op-plugin calls it for approximate="none" too, unless TORCH_NPU_USE_COMPATIBLE_IMPL is set
    (Ascend/op-plugin op_plugin/ops/opapi/GeluOutKernelNpuOpApi.cpp): an exact GELU is then not what one gets.
    """
    _check_gelu(environment, x, out)
    return lambda: store(out, _tanh_gelu(wide(x)))


@aclnn("aclnnGeluV2", "tensor int64 tensor", serves="gelu (TORCH_NPU_USE_COMPATIBLE_IMPL=1)", document=GELU_V2)
def gelu_v2(environment: Environment, x: Tensor, approximate: int, out: Tensor) -> Compute:
    """GELU by erf (approximate 0) or by tanh (1)."""
    _check_gelu(environment, x, out)
    if approximate not in (0, 1):
        raise invalid(f"approximate must be 0 or 1, but is {approximate}.")  # GeluV2, approximate
    if approximate:
        return lambda: store(out, _tanh_gelu(wide(x)))
    return lambda: store(out, _exact_gelu(wide(x)))


OPERATORS = (swiglu, gelu, gelu_v2)
