"""Flags in memory that GPUs share: raised at every peer, waited for here. Parts of kernels that exchange data."""

from __future__ import annotations

import triton
import triton.language as tl

LINE_BYTES = 128
"""A program's flags have a cache line to themselves: 8 bytes a source, two phases of at most 8 sources."""
PHASE_BYTES = 64
PATIENCE = 1024
"""Looks at a flag between two looks at the host's word, which are ten times as slow."""


@triton.jit
def raise_flags(peers, at, now, RANK: tl.constexpr, WORLD: tl.constexpr):
    """Set this rank's flag to ``now``, ``at`` bytes into each peer's memory; all stored before is seen with it."""
    tl.debug_barrier()
    # The fence is an atomic on this rank's own memory, at the place of its own flag, which nobody reads. The flags are
    # plain stores, since each has one writer: an atomic on a line that the peer looks at without pause waits for it,
    # measured 5 to 11 us a program, some 1.4 ms for 64 and more of them.
    fence = (tl.cast(peers[RANK], tl.int64) + at + RANK * 8).to(tl.pointer_type(tl.int64))
    tl.atomic_add(fence, 1, sem="acq_rel", scope="sys")
    for peer in tl.static_range(WORLD):
        if peer != RANK:
            flag = (tl.cast(peers[peer], tl.int64) + at + RANK * 8).to(tl.pointer_type(tl.int64))
            tl.store(flag, now)


@triton.jit
def await_flags(
    peers,
    at,
    now,
    given_up,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
    PATIENCE: tl.constexpr,
    WARPS: tl.constexpr,
):
    """``now``, once every peer's flag has come to it; negative where the host has given up, or ``now`` was negative."""
    # One thread looks, and the maximum over all threads is what it saw: threads that look for themselves may see
    # different things, and every look more keeps the peer's store from reaching the line.
    threads = tl.arange(0, 32 * WARPS)
    looks_here = threads == 0
    all_threads = threads * 0
    for peer in tl.static_range(WORLD):
        if peer != RANK:
            flag = (tl.cast(peers[RANK], tl.int64) + at + peer * 8).to(tl.pointer_type(tl.int64))
            seen = tl.max(tl.load(flag + all_threads, mask=looks_here, other=0, volatile=True), axis=0)
            looks = 0
            while (seen < now) & (now > 0):
                seen = tl.max(tl.load(flag + all_threads, mask=looks_here, other=0, volatile=True), axis=0)
                looks += 1
                if looks % PATIENCE == 0:
                    word = tl.max(tl.load(given_up + all_threads, mask=looks_here, other=0, volatile=True), axis=0)
                    if word != 0:
                        now = now * 0 - 1
            # What the peer stored before its flag is seen after it.
            tl.atomic_add(flag, 0, sem="acquire", scope="sys")
    return now
