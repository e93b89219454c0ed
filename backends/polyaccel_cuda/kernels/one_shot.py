"""A sum over ranks as one kernel: each rank shows its numbers to its peers, waits for theirs, and adds them itself."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from polyaccel_cuda.kernels.early import early, follow
from polyaccel_cuda.kernels.flags import LINE_BYTES, PATIENCE, await_flags, raise_flags

MOST_RANKS = 8
CHUNK_BYTES = 4096
"""What one program sums: 16 bytes a thread. A program waits only for the same program of its peers."""
MOST_BYTES = 1 << 20
PROGRAMS = MOST_BYTES // CHUNK_BYTES
FLAG_BYTES = PROGRAMS * LINE_BYTES
BUFFER_BYTES = FLAG_BYTES + 2 * MOST_BYTES
"""Of a rank's memory that its peers see: a flag for each program and source, then two halves of data."""
WARPS = 8


@triton.jit
def one_shot_all_reduce_kernel(
    x,
    n,
    peers,
    rounds,
    given_up,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNK_BYTES: tl.constexpr,
    MOST_BYTES: tl.constexpr,
    FLAG_BYTES: tl.constexpr,
    LINE_BYTES: tl.constexpr,
    PATIENCE: tl.constexpr,
    WARPS: tl.constexpr,
    EARLY: tl.constexpr,
):
    follow(EARLY)
    program = tl.program_id(0)
    lanes = tl.arange(0, CHUNK)
    at = program * CHUNK + lanes
    inside = at < n
    # Negative: this program has given up in an earlier call, and nothing it says may be believed.
    last = tl.load(rounds + program)
    now = last + 1
    own = tl.load(x + at, mask=inside, other=0.0)
    if last >= 0:
        # Two halves in turn: who writes this one again has seen every peer come to the call between, and so leave the
        # one before. No second wait is needed.
        offset = FLAG_BYTES + (now % 2) * MOST_BYTES + program * CHUNK_BYTES
        shown = (tl.cast(peers[RANK], tl.int64) + offset).to(tl.pointer_type(x.dtype.element_ty))
        tl.store(tl.multiple_of(shown, 16) + lanes, own, mask=inside)
        raise_flags(peers, program * LINE_BYTES, now, RANK, WORLD)
        now = await_flags(peers, program * LINE_BYTES, now, given_up, RANK, WORLD, PATIENCE, WARPS)
        if now > 0:
            # In the order of ranks and rounded once, so that all ranks have the same bits.
            total = tl.zeros([CHUNK], dtype=tl.float32)
            for peer in tl.static_range(WORLD):
                if peer == RANK:
                    part = own.to(tl.float32)
                else:
                    source = (tl.cast(peers[peer], tl.int64) + offset).to(tl.pointer_type(x.dtype.element_ty))
                    values = tl.load(tl.multiple_of(source, 16) + lanes, mask=inside, other=0.0, volatile=True)
                    part = values.to(tl.float32)
                total = part if peer == 0 else total + part
            tl.store(x + at, total.to(x.dtype.element_ty), mask=inside)
        tl.store(rounds + program, now)


def one_shot_all_reduce(
    x: torch.Tensor, rank: int, peers: tuple[int, ...], rounds: torch.Tensor, given_up: torch.Tensor
) -> None:
    """Sum ``x`` over ranks, in place: float32 in the order of ranks, rounded once, the same bits on all.

    Every rank calls it with the same sizes in the same order; asynchronous, and right in a graph that is replayed. A
    rank that waits for a peer in vain leaves when ``given_up`` is set: x is then worth nothing, and neither is any
    later call.

    Args:
        x: contiguous, float32, float16 or bfloat16, 1 to :data:`MOST_BYTES` bytes.
        peers: address of each rank's memory of :data:`BUFFER_BYTES` bytes, 16-byte aligned, zero before the first
            call; this rank's own at ``rank``.
        rounds: ``[PROGRAMS]`` int64 on the device, zero at first: how often each program has run.
        given_up: ``[1]`` int32 in memory that the host writes and the device reads.
    """
    chunk = CHUNK_BYTES // x.element_size()
    one_shot_all_reduce_kernel[(triton.cdiv(x.numel(), chunk),)](
        x,
        x.numel(),
        peers,
        rounds,
        given_up,
        RANK=rank,
        WORLD=len(peers),
        CHUNK=chunk,
        CHUNK_BYTES=CHUNK_BYTES,
        MOST_BYTES=MOST_BYTES,
        FLAG_BYTES=FLAG_BYTES,
        LINE_BYTES=LINE_BYTES,
        PATIENCE=PATIENCE,
        WARPS=WARPS,
        num_warps=WARPS,
        **early(),
    )
