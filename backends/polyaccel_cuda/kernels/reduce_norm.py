"""Sum over ranks, residual add and rms_norm in one kernel: a row-parallel layer's end at decode, one program a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from polyaccel_cuda.kernels.early import early, follow, lets_at_once
from polyaccel_cuda.kernels.flags import LINE_BYTES, PATIENCE, await_flags, raise_flags

MOST_ROWS = 128
MOST_COLUMNS = 16384
"""A row stays in registers between the sum of its squares and its norm."""
ROW_BYTES = 32 << 10
"""Each program has memory of its own, whatever the widths of calls before and after."""
FLAG_BYTES = MOST_ROWS * LINE_BYTES
BUFFER_BYTES = FLAG_BYTES + 2 * MOST_ROWS * ROW_BYTES
"""Of a rank's memory that its peers see: a line of flags a program, then two halves of rows."""


@triton.jit
def reduce_add_norm_kernel(
    x,
    x_stride,
    residual,
    residual_stride,
    weight,
    normed,
    total,
    n,
    eps,
    peers,
    base,
    rounds,
    given_up,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
    BLOCK: tl.constexpr,
    MOST_ROWS: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    FLAG_BYTES: tl.constexpr,
    LINE_BYTES: tl.constexpr,
    PATIENCE: tl.constexpr,
    WARPS: tl.constexpr,
    EARLY: tl.constexpr,
):
    follow(EARLY)
    program = tl.program_id(0)
    row = program.to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    inside = lanes < n
    # Negative: this program has given up in an earlier call.
    last = tl.load(rounds + program)
    now = last + 1
    own = tl.load(x + row * x_stride + lanes, mask=inside, other=0.0)
    # What needs no peer is read before any is waited for.
    added = tl.load(residual + row * residual_stride + lanes, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + lanes, mask=inside, other=0.0).to(tl.float32)
    if last >= 0:
        # Two halves in turn, as in kernels.one_shot: no second wait is needed.
        offset = base + FLAG_BYTES + (now % 2) * (MOST_ROWS * ROW_BYTES) + row * ROW_BYTES
        shown = (tl.cast(peers[RANK], tl.int64) + offset).to(tl.pointer_type(x.dtype.element_ty))
        tl.store(tl.multiple_of(shown, 16) + lanes, own, mask=inside)
        raise_flags(peers, base + program * LINE_BYTES, now, RANK, WORLD)
        now = await_flags(peers, base + program * LINE_BYTES, now, given_up, RANK, WORLD, PATIENCE, WARPS)
        if now > 0:
            summed = tl.zeros([BLOCK], dtype=tl.float32)
            for peer in tl.static_range(WORLD):
                if peer == RANK:
                    part = own.to(tl.float32)
                else:
                    source = (tl.cast(peers[peer], tl.int64) + offset).to(tl.pointer_type(x.dtype.element_ty))
                    values = tl.load(tl.multiple_of(source, 16) + lanes, mask=inside, other=0.0, volatile=True)
                    part = values.to(tl.float32)
                summed = part if peer == 0 else summed + part
            # Rounded where the parts of the station round.
            s = (summed.to(x.dtype.element_ty).to(tl.float32) + added).to(x.dtype.element_ty)
            tl.store(total + row * n + lanes, s, mask=inside)
            wide = s.to(tl.float32)
            scale = 1.0 / tl.sqrt_rn(tl.sum(wide * wide, 0) / n + eps)
            tl.store(normed + row * n + lanes, (wide * scale * w).to(normed.dtype.element_ty), mask=inside)
        tl.store(rounds + program, now)


def takes(x: torch.Tensor, n: int) -> bool:
    """Whether ``x: [T, at least n]`` is of a size that one launch serves. The same on all ranks."""
    return 0 < x.shape[0] <= MOST_ROWS and 0 < n <= MOST_COLUMNS and n * x.element_size() <= ROW_BYTES


def reduce_add_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    rank: int,
    peers: tuple[int, ...],
    base: int,
    rounds: torch.Tensor,
    given_up: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(normed, total)``, ``[T, n]`` each: ``total = sum of x over ranks + residual``, normed by rms_norm.

    ``total`` has the bits of :mod:`polyaccel_cuda.kernels.one_shot` and then ``rms_norm`` with a residual; ``normed``
    adds its squares in another order. Both are the same on all ranks where residual and weight are. x is not changed.
    Asynchronous, right in graphs, leaves when ``given_up`` is set: results are then not written.

    Args:
        x: ``[T, n]`` this rank's part, rows dense, for which :func:`takes` is true.
        residual: ``[T, n]``, rows dense.
        weight: ``[n]``.
        peers: address of each rank's memory, 16-byte aligned.
        base: where in it :data:`BUFFER_BYTES` bytes are this kernel's, zero before the first call.
        rounds: ``[MOST_ROWS]`` int64, zero at first: how often each program has run.
        given_up: ``[1]`` int32 in memory that the host writes and the device reads.
    """
    tokens, n = residual.shape
    normed = torch.empty((tokens, n), dtype=x.dtype, device=x.device)
    total = torch.empty_like(normed)
    block = max(128, triton.next_power_of_2(n))
    warps = 4 if block <= 2048 else 8 if block <= 8192 else 16
    reduce_add_norm_kernel[(tokens,)](
        x,
        x.stride(0),
        residual,
        residual.stride(0),
        weight,
        normed,
        total,
        n,
        eps,
        peers,
        base,
        rounds,
        given_up,
        RANK=rank,
        WORLD=len(peers),
        BLOCK=block,
        MOST_ROWS=MOST_ROWS,
        ROW_BYTES=ROW_BYTES,
        FLAG_BYTES=FLAG_BYTES,
        LINE_BYTES=LINE_BYTES,
        PATIENCE=PATIENCE,
        WARPS=warps,
        num_warps=warps,
        **early(lets_at_once(tokens)),
    )
    return normed, total
