"""A sum over ranks in two steps: each rank sums its share of all and hands it on. Half of one-shot's traffic and less.

Everything is pushed: stores to a peer need no answer, while loads from it wait for the link's whole way and back.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from polyaccel_cuda.kernels.flags import LINE_BYTES, PATIENCE, PHASE_BYTES, await_flags, raise_flags

PROGRAMS = 128
"""At most, nearly every multiprocessor; each takes one chunk of its rank's share after the other."""
CHUNK_BYTES = 8192
WARPS = 16
PROGRAM_BYTES = 128 << 10
"""Of the message, all shares, that one program serves; its place in memory is its own in every call."""
MOST_BYTES = PROGRAMS * PROGRAM_BYTES
FLAG_BYTES = PROGRAMS * LINE_BYTES


def buffer_bytes(world: int) -> int:
    """Of a rank's memory that its peers see: flags; what they hand in; what they hand on."""
    return FLAG_BYTES + 2 * PROGRAMS * world * _place_bytes(world)


def _place_bytes(world: int) -> int:
    """Of one program and source: whole chunks."""
    return -(-PROGRAM_BYTES // (world * CHUNK_BYTES)) * CHUNK_BYTES


def capacity(programs: int = PROGRAMS) -> int:
    """Bytes of the largest message that so many programs sum."""
    return programs * PROGRAM_BYTES


@triton.jit
def two_shot_all_reduce_kernel(
    x,
    n,
    share,
    peers,
    base,
    rounds,
    given_up,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNK_BYTES: tl.constexpr,
    PLACE_BYTES: tl.constexpr,
    PROGRAMS: tl.constexpr,
    FLAG_BYTES: tl.constexpr,
    LINE_BYTES: tl.constexpr,
    PHASE_BYTES: tl.constexpr,
    PATIENCE: tl.constexpr,
    WARPS: tl.constexpr,
):
    program = tl.program_id(0)
    lanes = tl.arange(0, CHUNK)
    last = tl.load(rounds + program)
    now = last + 1
    line = base + program * LINE_BYTES
    element = x.dtype.element_ty
    step = tl.num_programs(0) * CHUNK
    # Where this program finds what each source has left, and leaves what it has for others.
    handed_in = base + FLAG_BYTES + program.to(tl.int64) * (WORLD * PLACE_BYTES)
    handed_on = handed_in + PROGRAMS * WORLD * PLACE_BYTES
    if last >= 0:
        place = handed_in + RANK * PLACE_BYTES
        for start in range(program * CHUNK, share, step):
            for peer in tl.static_range(WORLD):
                if peer != RANK:
                    at = peer * share + start + lanes
                    part = tl.load(x + at, mask=at < n, other=0.0)
                    to = (tl.cast(peers[peer], tl.int64) + place).to(tl.pointer_type(element))
                    tl.store(tl.multiple_of(to, 16) + lanes, part, mask=at < n)
            place += CHUNK_BYTES
        raise_flags(peers, line, now, RANK, WORLD)
        now = await_flags(peers, line, now, given_up, RANK, WORLD, PATIENCE, WARPS)
        if now > 0:
            done = tl.cast(0, tl.int64)
            for start in range(program * CHUNK, share, step):
                at = RANK * share + start + lanes
                total = tl.zeros([CHUNK], dtype=tl.float32)
                # In the order of ranks and rounded once.
                for peer in tl.static_range(WORLD):
                    if peer == RANK:
                        part = tl.load(x + at, mask=at < n, other=0.0).to(tl.float32)
                    else:
                        own = tl.cast(peers[RANK], tl.int64) + handed_in + peer * PLACE_BYTES + done
                        source = tl.multiple_of(own.to(tl.pointer_type(element)), 16)
                        part = tl.load(source + lanes, mask=at < n, other=0.0, volatile=True).to(tl.float32)
                    total = part if peer == 0 else total + part
                rounded = total.to(element)
                tl.store(x + at, rounded, mask=at < n)
                for peer in tl.static_range(WORLD):
                    if peer != RANK:
                        its = tl.cast(peers[peer], tl.int64) + handed_on + RANK * PLACE_BYTES + done
                        tl.store(tl.multiple_of(its.to(tl.pointer_type(element)), 16) + lanes, rounded, mask=at < n)
                done += CHUNK_BYTES
            raise_flags(peers, line + PHASE_BYTES, now, RANK, WORLD)
            now = await_flags(peers, line + PHASE_BYTES, now, given_up, RANK, WORLD, PATIENCE, WARPS)
        if now > 0:
            done = tl.cast(0, tl.int64)
            for start in range(program * CHUNK, share, step):
                for peer in tl.static_range(WORLD):
                    if peer != RANK:
                        at = peer * share + start + lanes
                        own = tl.cast(peers[RANK], tl.int64) + handed_on + peer * PLACE_BYTES + done
                        source = tl.multiple_of(own.to(tl.pointer_type(element)), 16)
                        tl.store(x + at, tl.load(source + lanes, mask=at < n, other=0.0, volatile=True), mask=at < n)
                done += CHUNK_BYTES
        tl.store(rounds + program, now)


def two_shot_all_reduce(
    x: torch.Tensor,
    rank: int,
    peers: tuple[int, ...],
    base: int,
    rounds: torch.Tensor,
    given_up: torch.Tensor,
    programs: int = PROGRAMS,
) -> None:
    """Sum ``x`` over ranks, in place: float32 in the order of ranks, rounded once, the same bits on all.

    Every rank calls it with the same sizes in the same order; asynchronous, and right in a graph. No memory is used in
    turn: who hands in again has seen that its peer has summed what was there before, who hands on has seen that the
    peer is in this call, and so has taken what the call before handed on.

    Args:
        x: contiguous, float32, float16 or bfloat16, 1 to ``capacity(programs)`` bytes.
        peers: address of each rank's memory, 16-byte aligned.
        base: where in it :func:`buffer_bytes` bytes are this kernel's, zero before the first call.
        rounds: ``[PROGRAMS]`` int64, zero at first.
        given_up: ``[1]`` int32 in memory that the host writes and the device reads.
        programs: 1 to :data:`PROGRAMS`; few leave the device to others.
    """
    chunk, world = CHUNK_BYTES // x.element_size(), len(peers)
    chunks = triton.cdiv(x.numel(), chunk * world)
    two_shot_all_reduce_kernel[(min(programs, chunks),)](
        x,
        x.numel(),
        chunks * chunk,
        peers,
        base,
        rounds,
        given_up,
        RANK=rank,
        WORLD=world,
        CHUNK=chunk,
        CHUNK_BYTES=CHUNK_BYTES,
        PLACE_BYTES=_place_bytes(world),
        PROGRAMS=PROGRAMS,
        FLAG_BYTES=FLAG_BYTES,
        LINE_BYTES=LINE_BYTES,
        PHASE_BYTES=PHASE_BYTES,
        PATIENCE=PATIENCE,
        WARPS=WARPS,
        num_warps=WARPS,
    )
