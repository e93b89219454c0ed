"""The rotation and the KV write alone, where no station does them after the product: one program a row and head."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from polyaccel.backend import RopeTable


@triton.jit
def rotate_kernel(
    x,
    out,
    positions,
    cos,
    sin,
    x_row,
    x_head,
    head_dim,
    half,
    INTERLEAVED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    heads = tl.num_programs(1)
    i = tl.arange(0, BLOCK)
    turned = i < half
    if INTERLEAVED:
        one, two = 2 * i, 2 * i + 1
    else:
        one, two = i, i + half
    rest = 2 * half + tl.arange(0, BLOCK_REST)
    over = rest < head_dim
    x += row * x_row + head * x_head
    out += (row * heads + head) * head_dim
    position = tl.load(positions + row)
    c = tl.load(cos + position * half + i, mask=turned, other=1.0)
    s = tl.load(sin + position * half + i, mask=turned, other=0.0)
    x1 = tl.load(x + one, mask=turned, other=0.0).to(tl.float32)
    x2 = tl.load(x + two, mask=turned, other=0.0).to(tl.float32)
    kind = out.dtype.element_ty
    tl.store(out + one, (x1 * c - x2 * s).to(kind), mask=turned)
    tl.store(out + two, (x2 * c + x1 * s).to(kind), mask=turned)
    tl.store(out + rest, tl.load(x + rest, mask=over, other=0.0), mask=over)


def rotate(x: torch.Tensor, rope: RopeTable, positions: torch.Tensor) -> torch.Tensor:
    """``x: [T, heads, head_dim]``, last dimension dense, rotated; a new dense tensor."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        half, head_dim = rope.rotary_dim // 2, x.shape[2]
        rotate_kernel[(x.shape[0], x.shape[1])](
            x,
            out,
            positions,
            rope.cos,
            rope.sin,
            x.stride(0),
            x.stride(1),
            head_dim,
            half,
            INTERLEAVED=rope.style == "interleaved",
            BLOCK=max(2, triton.next_power_of_2(max(1, half))),
            BLOCK_REST=max(2, triton.next_power_of_2(max(1, head_dim - 2 * half))),
            num_warps=1,
        )
    return out


@triton.jit
def write_kv_kernel(
    k,
    v,
    keys,
    values,
    slots,
    k_row,
    k_head,
    v_row,
    v_head,
    kv_heads,
    head_dim,
    block_size,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    slot = tl.load(slots + row)
    if slot >= 0:
        columns = tl.arange(0, BLOCK)
        inside = columns < head_dim
        offset = ((slot // block_size * kv_heads + head) * block_size + slot % block_size) * head_dim
        found = tl.load(k + row * k_row + head * k_head + columns, mask=inside)
        tl.store(keys + offset + columns, found, mask=inside)
        found = tl.load(v + row * v_row + head * v_head + columns, mask=inside)
        tl.store(values + offset + columns, found, mask=inside)


def write_kv(k: torch.Tensor, v: torch.Tensor, cache: tuple[torch.Tensor, torch.Tensor], slots: torch.Tensor) -> None:
    """Store ``k, v: [T, kv_heads, head_dim]``, last dimension dense, at ``slots: [T]`` int64; -1 stores nothing."""
    keys, values = cache
    if not k.numel():
        return
    write_kv_kernel[(k.shape[0], k.shape[1])](
        k,
        v,
        keys,
        values,
        slots,
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        keys.shape[1],
        keys.shape[3],
        keys.shape[2],
        BLOCK=triton.next_power_of_2(keys.shape[3]),
        num_warps=1,
    )
