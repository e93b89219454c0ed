"""Products of which a row has the same bits whatever other rows there are, rounded once with their bias.

Every element is one sum over k, in order, in tiles for tensor cores; neither how k is cut nor which tile is used
depends on the rows. cuBLAS chooses both by their number: these are for ``batch_invariant``, and for a bias where cuBLAS
would round before it adds it. That few rows and many have the same bits was measured on an H100, where both kinds of
tile add 16 products at a time (docs/cuda.md).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from polyaccel_cuda.kernels.few import MOST_ROWS, Form, few_rows, shared_memory

GROUP = 8
"""Blocks of rows that share columns of the matrix while those are in the L2 cache."""


@triton.jit
def many_rows_kernel(
    x,
    matrix,
    bias,
    y,
    rows,
    columns,
    k,
    x_stride,
    stride,
    y_stride,
    HAS_BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    program = tl.program_id(0)
    high, wide = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    first = program // (GROUP * wide) * GROUP
    group = tl.minimum(high - first, GROUP)
    tile_m = first + program % (GROUP * wide) % group
    tile_n = program % (GROUP * wide) // group
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    index = tl.arange(0, BLOCK_K)
    # What lies beyond is read from the first row and never stored.
    x_at = x + tl.where(m < rows, m, 0).to(tl.int64)[:, None] * x_stride + index[None, :]
    w_at = matrix + tl.where(n < columns, n, 0).to(tl.int64)[:, None] * stride + index[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, k, BLOCK_K):
        if EVEN:
            v, w = tl.load(x_at), tl.load(w_at)
        else:
            inside = (start + index < k)[None, :]
            v, w = tl.load(x_at, mask=inside, other=0.0), tl.load(w_at, mask=inside, other=0.0)
        acc = tl.dot(v, tl.trans(w), acc, input_precision="ieee")
        x_at += BLOCK_K
        w_at += BLOCK_K
    if HAS_BIAS:
        acc += tl.load(bias + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
    where = y + m.to(tl.int64)[:, None] * y_stride + n[None, :]
    tl.store(where, acc.to(y.dtype.element_ty), mask=(m < rows)[:, None] & (n < columns)[None, :])


def product(
    x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """``x @ matrix.T + bias`` for ``x: [T, k]`` and ``matrix: [n, k]``, rows dense; into ``out: [T, n]`` if given."""
    tokens, k = x.shape
    n = matrix.shape[0]
    if tokens <= MOST_ROWS:
        return few_rows(x, matrix, n, bias, out=out, lone=False)
    y = torch.empty((tokens, n), dtype=x.dtype, device=x.device) if out is None else out
    if not y.numel():
        return y
    rows, form, warps = (64, Form(32, 2, turned=False, block=32), 4)
    if x.dtype != torch.float32:
        rows, form, warps = (128, Form(128, 4, turned=False, block=64), 8)
    block = min(form.block, max(16, triton.next_power_of_2(k)))
    stage = (rows + form.columns) * block * x.element_size()
    many_rows_kernel[(triton.cdiv(tokens, rows) * triton.cdiv(n, form.columns),)](
        x,
        matrix,
        x if bias is None else bias,
        y,
        tokens,
        n,
        k,
        x.stride(0),
        matrix.stride(0),
        y.stride(0),
        HAS_BIAS=bias is not None,
        EVEN=k % block == 0,
        GROUP=GROUP,
        BLOCK_M=rows,
        BLOCK_N=form.columns,
        BLOCK_K=block,
        num_warps=warps,
        num_stages=max(1, min(form.stages, shared_memory(x.device) // stage)),
    )
    return y
