"""PyTorch's own eager operators, on any torch device.

    polyaccel conformance run --table conformance/polyaccel_conformance/tables/torch_eager.py:EAGER --device cuda

Each entry says how its signature maps and what PyTorch never promised.

The functions open a backend under one setting of the BLAS library each; the settings belong to the process.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch.nn import functional

from polyaccel.backend import Backend, TableBackend
from polyaccel.backend.composite.linear import dequantize, linear
from polyaccel_conformance.promises import Kernel, NotPromised


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """``F.rms_norm``, after an addition where there is a residual."""
    if residual is None:
        return functional.rms_norm(x, (x.shape[-1],), weight, eps)
    s = x + residual
    return functional.rms_norm(s, (s.shape[-1],), weight, eps), s


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """``F.layer_norm`` over the last dimension."""
    return functional.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """``F.silu`` of the first half times the second."""
    gate, up = x.chunk(2, -1)
    return functional.silu(gate) * up


def gelu(x: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    """``F.gelu``."""
    return functional.gelu(x, approximate=approximate)


NON_FINITE = NotPromised(
    checks=("nonfinite.rules",),
    reason="PyTorch says of non-finite operands only that results may be so too (its notes on numerical accuracy)",
)
INFINITE = NotPromised(
    checks=("values.bound",),
    causes=("not a number",),
    axes="data=infinite",
    reason="the limit of GELU at infinity is not stated; some kernels give NaN",
)
ERF = NotPromised(
    checks=("values.bound",),
    causes=("wrong value",),
    axes="dtype=float32,attributes.approximate=none",
    # The polynomial 7.1.26 of Abramowitz and Stegun has an error of 1.5e-7, which is 2.6 x 2^-24.
    at_most=2.6,
    reason="no accuracy of erf is stated: the CPU's vector form has fewer correct bits than the scalar one",
)
SLICES = NotPromised(
    checks=("layout.arguments", "invariance.*"),
    causes=("result depends on the layout", "depends on the batch"),
    reason="a slice or a part of a batch need not have the bits of the whole (its notes on numerical accuracy)",
)
REDUCED = NotPromised(
    checks=("values.bound", "values.exact", "numerics.measured"),
    axes="dtype=*float16",
    reason="by default sums of 16-bit products may be kept in 16 bits: allow_fp16_reduced_precision_reduction",
)

EAGER: Mapping[str, Kernel] = MappingProxyType(
    {
        "linear": Kernel(linear, mapping="F.linear(x, the weight as a plain tensor)", not_promised=(REDUCED, SLICES)),
        "dequantize": Kernel(dequantize, mapping="plain tensor operations"),
        "rms_norm": Kernel(
            rms_norm,
            mapping="F.rms_norm(x, [hidden], weight, eps), with a residual of x + residual",
            not_promised=(NON_FINITE, SLICES),
        ),
        "layer_norm": Kernel(
            layer_norm, mapping="F.layer_norm(x, [hidden], weight, bias, eps)", not_promised=(NON_FINITE, SLICES)
        ),
        "silu_and_mul": Kernel(
            silu_and_mul,
            mapping="F.silu(x[:, :n]) * x[:, n:], rounded to the dtype of x in between",
            not_promised=(NON_FINITE, SLICES),
        ),
        "gelu": Kernel(
            gelu, mapping="F.gelu(x, approximate=approximate)", not_promised=(NON_FINITE, INFINITE, ERF, SLICES)
        ),
    }
)


class _Composites(TableBackend):
    """Everything as composites, under one setting of the BLAS library.

    ``reduced``: whether sums of 16-bit products may be kept in 16 bits, between split parts of k too. ``library``:
    ``cublaslt`` adds a bias before it rounds; ``cublas`` rounds the product first, which the contract does not permit.
    """

    def __init__(self, *, library: str = "cublaslt", tf32: bool = False, reduced: bool = False) -> None:
        torch.backends.cuda.preferred_blas_library(library)
        matmul = torch.backends.cuda.matmul
        matmul.allow_tf32 = tf32
        # Only cublaslt can do without splitting k.
        allowed = (reduced, reduced) if library == "cublaslt" else reduced
        matmul.allow_fp16_reduced_precision_reduction = allowed
        matmul.allow_bf16_reduced_precision_reduction = allowed
        super().__init__("cuda", {}, name="composites")


def cuda_composites() -> Backend:
    """Full float32 products, float32 sums, one rounding: must pass at every tier."""
    return _Composites()


def cuda_cublas() -> Backend:
    """The same with cuBLAS, which rounds a 16-bit product before it adds the bias: must be named."""
    return _Composites(library="cublas")


def cuda_tf32() -> Backend:
    """float32 products in TF32: must be named."""
    return _Composites(tf32=True)


def cuda_reduced() -> Backend:
    """Sums of 16-bit products in 16 bits, PyTorch's default: must be named."""
    return _Composites(library="cublas", reduced=True)
