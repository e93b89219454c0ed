"""PyTorch's own eager operators, on any torch device.

    polyaccel conformance run --table conformance/polyaccel_conformance/tables/torch_eager.py:EAGER --device cuda

How signatures map: a row-wise operator is the function of ``torch.nn.functional`` of the same meaning; ``linear`` is
``F.linear`` on the weight as a plain tensor. What PyTorch never promised: one rounding of 16-bit results (activations
in 16 bits round between their parts), float32 sums where ``allow_tf32`` or a reduced-precision reduction is switched
on, the same bits whatever the number of rows. A failure there is a finding about the setting, not a bug of PyTorch.

The functions open a backend under one setting of the BLAS library each; the settings belong to the process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch.nn import functional

from polyaccel.backend import Backend, TableBackend
from polyaccel.backend.composite.linear import dequantize, linear


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


EAGER: Mapping[str, Callable[..., object]] = MappingProxyType(
    {
        "linear": linear,
        "dequantize": dequantize,
        "rms_norm": rms_norm,
        "layer_norm": layer_norm,
        "silu_and_mul": silu_and_mul,
        "gelu": gelu,
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
