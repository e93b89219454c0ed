"""Products by cuBLAS with float32 sums, whatever the process has allowed elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.functional import linear

from polyaccel_cuda.kernels import invariant

VECTOR = 16
"""Bytes that cuBLAS's better kernels load at once."""

# No reduced precision; k may be split, its parts are summed in float32. Without splits one row takes 2.4 times as long.
WIDE_SUMS = (False, True)


@contextmanager
def full_precision() -> Iterator[None]:
    """No TF32, no sums of 16-bit partial results, and a bias added before the only rounding (cuBLASLt).

    torch allows the second by default, and cuBLAS rounds before it adds. Restores what was set.
    """
    matmul, cuda = torch.backends.cuda.matmul, torch.backends.cuda
    before = (
        matmul.allow_tf32,
        torch._C._get_cublas_allow_fp16_reduced_precision_reduction(),
        torch._C._get_cublas_allow_bf16_reduced_precision_reduction(),
        cuda.preferred_blas_library(),
    )
    cuda.preferred_blas_library("cublaslt")
    matmul.allow_tf32 = False
    matmul.allow_fp16_reduced_precision_reduction = WIDE_SUMS
    matmul.allow_bf16_reduced_precision_reduction = WIDE_SUMS
    try:
        yield
    finally:
        matmul.allow_tf32 = before[0]
        matmul.allow_fp16_reduced_precision_reduction = before[1]
        matmul.allow_bf16_reduced_precision_reduction = before[2]
        cuda.preferred_blas_library(before[3])


def product(x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ matrix.T + bias``, rows dense; no rows, columns or k are fine."""
    if x.device.type != "cuda":
        return linear(x, matrix, bias)
    if bias is not None and rounds_before_bias(x, matrix):
        return invariant.product(x, matrix, bias)
    with full_precision():
        return linear(x, matrix, bias)


def rounds_before_bias(x: torch.Tensor, matrix: torch.Tensor) -> bool:
    """Whether cuBLASLt may round the product to 16 bits and again with the bias: it did on an H100 (CUDA 13.0)
    where rows are not all at multiples of 16 bytes.
    """
    size = x.element_size()
    places = (x.data_ptr(), x.stride(0) * size, matrix.data_ptr(), matrix.stride(0) * size, matrix.shape[0] * size)
    return size == 2 and any(place % VECTOR for place in places)
