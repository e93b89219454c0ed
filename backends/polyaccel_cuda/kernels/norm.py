"""rms_norm and layer_norm of rows, with an optional residual: one program a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from polyaccel_cuda.kernels.early import early, follow, lets_at_once

# Rows up to this width stay in registers between the two passes.
ONE_PASS = 16384


@triton.jit
def rms_norm_kernel(
    x,
    residual,
    weight,
    out,
    total,
    inner,
    n,
    eps,
    x_outer,
    x_inner,
    r_outer,
    r_inner,
    HAS_RESIDUAL: tl.constexpr,
    ONE: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    follow(EARLY)
    row = tl.program_id(0).to(tl.int64)
    outer, middle = row // inner, row % inner
    x += outer * x_outer + middle * x_inner
    out += row * n
    total += row * n
    if HAS_RESIDUAL:
        residual += outer * r_outer + middle * r_inner
    columns = tl.arange(0, BLOCK)
    if ONE:
        inside = columns < n
        s = tl.load(x + columns, mask=inside, other=0.0)
        if HAS_RESIDUAL:
            s = (s.to(tl.float32) + tl.load(residual + columns, mask=inside, other=0.0).to(tl.float32)).to(s.dtype)
            tl.store(total + columns, s, mask=inside)
        wide = s.to(tl.float32)
        scale = 1.0 / tl.sqrt_rn(tl.sum(wide * wide, 0) / n + eps)
        w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + columns, (wide * scale * w).to(out.dtype.element_ty), mask=inside)
    else:
        squares = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, n, BLOCK):
            inside = start + columns < n
            s = tl.load(x + start + columns, mask=inside, other=0.0)
            if HAS_RESIDUAL:
                r = tl.load(residual + start + columns, mask=inside, other=0.0)
                s = (s.to(tl.float32) + r.to(tl.float32)).to(s.dtype)
                tl.store(total + start + columns, s, mask=inside)
            wide = s.to(tl.float32)
            squares += wide * wide
        scale = 1.0 / tl.sqrt_rn(tl.sum(squares, 0) / n + eps)
        for start in range(0, n, BLOCK):
            inside = start + columns < n
            s = tl.load(x + start + columns, mask=inside, other=0.0)
            if HAS_RESIDUAL:
                r = tl.load(residual + start + columns, mask=inside, other=0.0)
                s = (s.to(tl.float32) + r.to(tl.float32)).to(s.dtype)
            w = tl.load(weight + start + columns, mask=inside, other=0.0).to(tl.float32)
            tl.store(out + start + columns, (s.to(tl.float32) * scale * w).to(out.dtype.element_ty), mask=inside)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``(normed, s)`` of ``x, residual: [..., hidden]`` whose last dimension is dense; s is None without a residual."""
    rows = as_rows(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    other = None if residual is None else as_rows(residual)
    total = out if residual is None else torch.empty_like(out)
    n = x.shape[-1]
    if out.numel():
        block = min(triton.next_power_of_2(n), ONE_PASS)
        rms_norm_kernel[(rows.shape[0] * rows.shape[1],)](
            rows,
            rows if other is None else other,
            weight,
            out,
            total,
            rows.shape[1],
            n,
            eps,
            rows.stride(0),
            rows.stride(1),
            0 if other is None else other.stride(0),
            0 if other is None else other.stride(1),
            HAS_RESIDUAL=other is not None,
            ONE=n <= block,
            BLOCK=block,
            num_warps=4 if block <= 2048 else 8 if block <= 8192 else 16,
            **early(lets_at_once(rows.shape[0])),
        )
    return out, None if residual is None else total


@triton.jit
def layer_norm_kernel(
    x, weight, bias, out, inner, n, eps, x_outer, x_inner, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    x += (row // inner) * x_outer + (row % inner) * x_inner
    out += row * n
    columns = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        inside = start + columns < n
        sums += tl.load(x + start + columns, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(sums, 0) / n
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        inside = start + columns < n
        centred = tl.load(x + start + columns, mask=inside, other=0.0).to(tl.float32) - mean
        squares += tl.where(inside, centred * centred, 0.0)
    scale = 1.0 / tl.sqrt_rn(tl.sum(squares, 0) / n + eps)
    for start in range(0, n, BLOCK):
        inside = start + columns < n
        centred = tl.load(x + start + columns, mask=inside, other=0.0).to(tl.float32) - mean
        y = centred * scale * tl.load(weight + start + columns, mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            y += tl.load(bias + start + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + start + columns, y.to(out.dtype.element_ty), mask=inside)


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """Of ``x: [..., hidden]`` whose last dimension is dense; a new tensor."""
    rows = as_rows(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    n = x.shape[-1]
    if out.numel():
        layer_norm_kernel[(rows.shape[0] * rows.shape[1],)](
            rows,
            weight,
            weight if bias is None else bias,
            out,
            rows.shape[1],
            n,
            eps,
            rows.stride(0),
            rows.stride(1),
            HAS_BIAS=bias is not None,
            BLOCK=min(triton.next_power_of_2(n), 4096),
        )
    return out


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """``x: [..., n]`` as ``[outer, inner, n]`` without a copy where two strides can tell where its rows are."""
    if x.dim() == 1:
        return x.view(1, 1, -1)
    if x.dim() == 2:
        return x.unsqueeze(1)
    return x if x.dim() == 3 else x.reshape(-1, 1, x.shape[-1])
