"""A sum of two ranks that leaves the multiprocessors to others: a copy engine pushes, one warp waits, a kernel adds."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from polyaccel_cuda.kernels.flags import LINE_BYTES, PATIENCE, await_flags, raise_flags

FLAG_BYTES = LINE_BYTES
SLOT_BYTES = 16 << 20
"""Of a part that is pushed at once. Two slots are used in turn."""
BUFFER_BYTES = FLAG_BYTES + 2 * SLOT_BYTES
WAIT_WARPS = 1
ADD_BLOCK = 2048


@triton.jit
def meet_kernel(
    peers, base, rounds, given_up, RANK: tl.constexpr, WORLD: tl.constexpr, PATIENCE: tl.constexpr, WARPS: tl.constexpr
):
    last = tl.load(rounds)
    if last >= 0:
        raise_flags(peers, base, last + 1, RANK, WORLD)
        now = await_flags(peers, base, last + 1, given_up, RANK, WORLD, PATIENCE, WARPS)
        tl.store(rounds, now)


@triton.jit
def add_received_kernel(x, received, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    own = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    # A peer's copy wrote it: nothing of it may come from what this multiprocessor read before.
    other = tl.load(received + at, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
    tl.store(x + at, (own + other).to(x.dtype.element_ty), mask=inside)


def meet(rank: int, peers: tuple[int, ...], base: int, rounds: torch.Tensor, given_up: torch.Tensor) -> None:
    """Tell every peer that what came before is done on this rank's stream, and wait until each has said so.

    Args:
        peers: address of each rank's memory.
        base: where in it :data:`FLAG_BYTES` bytes are this kernel's, zero before the first call.
        rounds: ``[1]`` int64, zero at first.
        given_up: ``[1]`` int32 in memory that the host writes and the device reads.
    """
    world = len(peers)
    meet_kernel[(1,)](
        peers,
        base,
        rounds,
        given_up,
        RANK=rank,
        WORLD=world,
        PATIENCE=PATIENCE,
        WARPS=WAIT_WARPS,
        num_warps=WAIT_WARPS,
    )


def add_received(x: torch.Tensor, received: torch.Tensor) -> None:
    """``x += received`` in float32, rounded once; the same bits whichever of two ranks adds the other's.

    Args:
        x: contiguous; 16-byte aligned.
        received: of its dtype, at least as many elements.
    """
    n = x.numel()
    add_received_kernel[(triton.cdiv(n, ADD_BLOCK),)](x, received, n, BLOCK=ADD_BLOCK, num_warps=8)
