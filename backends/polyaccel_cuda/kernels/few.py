"""Products of few rows: the matrix is read once, at nearly the memory's speed, and the rank rows named by a list.

cuBLAS takes 5.4 ms for the products of a Mistral-7B step at batch 1, these 4.8 (docs/cuda.md). Sums run over k in one
order, so a row's result does not depend on how many other rows there are from two on, nor on the run.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from polyaccel_cuda.kernels.early import early, follow

MOST_ROWS = 64
"""Beyond this many rows cuBLAS is faster."""
ONE_ROW_COLUMNS, ONE_ROW_BLOCK, ONE_ROW_WARPS = 2, 2048, 2
"""Of a program of the product of a single row: columns, the step in k, warps.

Measured for the products of a Mistral-7B step on an H100, in ms: 4.99; with 4 columns and 4 warps 5.14, with steps of
4096 5.17. An H200 says the same.
"""


def gathers(rows: int) -> bool:
    """Whether a step of so many tokens reads the rank rows that it names, and no others."""
    return rows <= MOST_ROWS


@triton.jit
def _row_of(columns, base, total, slices, listed, LISTED: tl.constexpr):
    """Rows of the matrix that give the ``columns`` of the product: base rows, then all slices of each listed one."""
    row = columns
    if LISTED:
        over = columns - base
        named = tl.load(listed + tl.maximum(over, 0) // slices, mask=(over >= 0) & (columns < total), other=0)
        row = tl.where(over >= 0, base + named * slices + over % slices, columns)
    return tl.where(columns < total, row, 0).to(tl.int64)


@triton.jit
def one_row_kernel(
    x,
    matrix,
    bias,
    y,
    listed,
    biased,
    base,
    total,
    k,
    stride,
    slices,
    LISTED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
):
    follow(EARLY)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = _row_of(columns, base, total, slices, listed, LISTED)
    index = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in range(0, k, BLOCK_K):
        where = matrix + row[:, None] * stride + (start + index)[None, :]
        if EVEN:
            # The matrix is larger than the cache: what else is in there should stay.
            w = tl.load(where, eviction_policy="evict_first")
            v = tl.load(x + start + index)
        else:
            inside = start + index < k
            w = tl.load(where, mask=inside[None, :], other=0.0)
            v = tl.load(x + start + index, mask=inside, other=0.0)
        acc += w.to(tl.float32) * v.to(tl.float32)[None, :]
    out = tl.sum(acc, 1)
    if HAS_BIAS:
        out += tl.load(bias + columns, mask=columns < biased, other=0.0).to(tl.float32)
    tl.store(y + columns, out.to(y.dtype.element_ty), mask=columns < total)


class Form(NamedTuple):
    """What a program of the product of several rows takes: ``columns``, and a step in k of ``block``. ``turned``: the
    matrix is the left operand, of at least 64 rows, which Hopper's wide instruction wants."""

    columns: int
    stages: int
    turned: bool
    block: int = 128


def _form(rows: int, total: int, k: int, dtype: torch.dtype) -> Form:
    """Measured on an H100 in whole steps, with graphs in turns, base and with 32 adapters of their own.

    Wide programs with deep pipelines; where there are few columns, narrow ones: docs/cuda.md.
    """
    many = rows > 32
    if dtype == torch.float32:
        return Form(columns=32, stages=2, turned=False)
    if total >= 16384:
        return Form(128, 3, turned=True)
    if total >= 8192:
        return Form(32, 3, turned=False) if many else Form(64, 6, turned=True, block=64)
    if total >= 6144:
        return Form(64, 5 if many else 4, turned=True)
    if many:
        return Form(32, 6, turned=False)
    return Form(64, 8 if k >= 8192 else 6, turned=True)


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a program may have: a third of Hopper's on smaller chips."""
    if device.type != "cuda":
        return 1 << 20
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index)
    return int(properties["max_shared_mem"])


@triton.jit
def few_rows_kernel(
    x,
    matrix,
    bias,
    y,
    listed,
    biased,
    rows,
    base,
    total,
    k,
    x_stride,
    stride,
    y_stride,
    slices,
    LISTED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    TURNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
):
    follow(EARLY)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = _row_of(columns, base, total, slices, listed, LISTED)
    m = tl.arange(0, BLOCK_M)
    present = m < rows
    index = tl.arange(0, BLOCK_K)
    if TURNED:
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    w_at = matrix + row[:, None] * stride + index[None, :]
    x_at = x + m[:, None].to(tl.int64) * x_stride + index[None, :]
    for start in range(0, k, BLOCK_K):
        if EVEN:
            w = tl.load(w_at, eviction_policy="evict_first")
            v = tl.load(x_at, mask=present[:, None], other=0.0)
        else:
            inside = start + index < k
            w = tl.load(w_at, mask=inside[None, :], other=0.0)
            v = tl.load(x_at, mask=present[:, None] & inside[None, :], other=0.0)
        if TURNED:
            acc = tl.dot(w, tl.trans(v), acc, input_precision="ieee")
        else:
            acc = tl.dot(v, tl.trans(w), acc, input_precision="ieee")
        w_at += BLOCK_K
        x_at += BLOCK_K
    if TURNED:
        acc = tl.trans(acc)
    if HAS_BIAS:
        acc += tl.load(bias + columns, mask=columns < biased, other=0.0).to(tl.float32)[None, :]
    where = y + m[:, None].to(tl.int64) * y_stride + columns[None, :]
    tl.store(where, acc.to(y.dtype.element_ty), mask=present[:, None] & (columns < total)[None, :])


def few_rows(
    x: torch.Tensor,
    matrix: torch.Tensor,
    base: int,
    bias: torch.Tensor | None = None,
    listed: torch.Tensor | None = None,
    covered: int = 0,
    slices: int = 1,
    out: torch.Tensor | None = None,
    lone: bool = True,
) -> torch.Tensor:
    """``[T, base + covered * slices]``: ``x @ matrix[:base].T + bias``, then the rank rows that a list names.

    Args:
        x: ``[T, k]``, T at most :data:`MOST_ROWS`, rows dense.
        matrix: ``[rows, k]``, rows dense; rank row r of slice s is row ``base + r * slices + s``.
        bias: ``[at most base]``.
        listed: ``[at least covered]`` int32 rank rows.
        out: the result, rows dense; new if there is none.
        lone: a row that is the only one has a kernel of its own, which adds in another order.
    """
    tokens, k = x.shape
    total = base + covered * slices
    y = torch.empty((tokens, total), dtype=x.dtype, device=x.device) if out is None else out
    if not y.numel():
        return y
    known = x if listed is None else listed
    shift, biased = (x, 0) if bias is None else (bias, len(bias))
    if lone and tokens == 1:
        block = min(ONE_ROW_BLOCK, max(16, triton.next_power_of_2(k)))
        one_row_kernel[(triton.cdiv(total, ONE_ROW_COLUMNS),)](
            x,
            matrix,
            shift,
            y,
            known,
            biased,
            base,
            total,
            k,
            matrix.stride(0),
            slices,
            LISTED=listed is not None,
            HAS_BIAS=bias is not None,
            EVEN=k % block == 0,
            BLOCK_N=ONE_ROW_COLUMNS,
            BLOCK_K=block,
            num_warps=ONE_ROW_WARPS,
            **early(),
        )
        return y
    rows = max(16, triton.next_power_of_2(tokens))
    form = _form(rows, total, k, x.dtype)
    block = min(form.block, max(16, triton.next_power_of_2(k)))
    stage = (form.columns + rows) * block * x.element_size()
    few_rows_kernel[(triton.cdiv(total, form.columns),)](
        x,
        matrix,
        shift,
        y,
        known,
        biased,
        tokens,
        base,
        total,
        k,
        x.stride(0),
        matrix.stride(0),
        y.stride(0),
        slices,
        LISTED=listed is not None,
        HAS_BIAS=bias is not None,
        EVEN=k % block == 0,
        TURNED=form.turned,
        BLOCK_M=rows,
        BLOCK_N=form.columns,
        BLOCK_K=block,
        num_warps=4,
        num_stages=max(1, min(form.stages, shared_memory(x.device) // stage)),
        **early(),
    )
    return y
