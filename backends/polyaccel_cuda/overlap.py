"""While one part of a product is summed over ranks the next one is multiplied: row-parallel layers at prefill.

The model, by which the constants were chosen (two H200, bfloat16, K = 4096 a rank, N = 8192; G is the product's time,
S the bytes of its result, L what a copy engine moves one way, A what an addition of two tensors reads and writes):

- one after the other takes ``G + S / busbw``: 90 + 82 us at 1024 rows, 354 + 282 us at 4096 (measured, NCCL);
- in c parts ``G(c) + S / (c L) + 3 S / (c A) + (c - 1) 3 S / (c A) w + t``, where L = 390 GB/s and A = 4 TB/s. G(c) is
  c products of T / c rows: 4 x 26 us at 256 rows, as measured, and hardly more than G where a part still fills the
  device, 128 tiles of 128 x 256 for its 132 multiprocessors: at 512 rows of 8192. w, between 0 and 1, is the share of
  an addition that takes time from the product beside it, t some 5 us for the last meeting of the ranks;
- at 1024 rows in 2 parts: 92 + 22 + 6 + 6 w + 5 = 125 to 131 us; in 4: 105 + 11 + 3 + 9 w + 5 = 124 to 133;
- at 4096 rows in 4: 360 + 43 + 12 + 36 w + 5 = 420 to 456 us; in 8: 368 + 22 + 6 + 42 w + 5 = 401 to 443.

A sum by multiprocessors takes some of them for as long as it lasts: 24 of 132 lengthen the product by a fifth, more
where tiles then need one round more. So two ranks push with a copy engine, which takes none; more ranks use NCCL, since
what is pushed to every peer would be (ranks - 1) S.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Protocol

import torch

TILE_ROWS = 128
"""Parts begin at multiples of this, so that no product has half a tile in its middle."""
LEAST_BYTES = 24 << 20
"""Of a result; below, a two-shot sum after the whole product is faster than parts, measured."""
PART_BYTES = 16 << 20
"""Of a part where there are rows enough: 461 us in 4 parts at 4096 rows, 527 in 8 and 743 in 16, measured."""
MOST_PART_BYTES = 16 << 20

Produce = Callable[[int, int], object]
"""Fills rows ``begin`` to ``end`` of the result, on the current stream."""


def bounds(rows: int, row_bytes: int) -> tuple[int, ...]:
    """Where parts begin, and the end; ``(0, rows)`` if the sum should follow the whole product.

    There is an even number of parts: two buffers are used in turn, and every sum begins with the first. The same on
    all ranks, since it depends on nothing else.
    """
    blocks, nbytes = -(-rows // TILE_ROWS), rows * row_bytes
    if nbytes < LEAST_BYTES:
        return (0, rows)
    most = MOST_PART_BYTES // (TILE_ROWS * row_bytes)
    if not most:
        return (0, rows)
    count = max(2, -(-nbytes // PART_BYTES), -(-blocks // most))
    count += count % 2
    if count > blocks:
        return (0, rows)
    small, more = divmod(blocks, count)
    starts = [TILE_ROWS * (i * small + min(i, more)) for i in range(count)]
    return (*starts, rows)


class Sums(Protocol):
    """How a part is summed, on the current stream."""

    def __call__(self, part: torch.Tensor, index: int) -> None: ...


class Lane(Protocol):
    """A second stream of a device."""

    def follow(self) -> None:
        """What comes next on this lane comes after all that is on the current stream."""

    def run(self, fn: Callable[[], None]) -> None:
        """Call ``fn`` with the lane as the current stream."""

    def join(self) -> None:
        """What comes next on the current stream comes after all that is on this lane."""


class SideStream:
    """A stream that goes before others: its kernels are few and short, and others wait for them."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        self._device = device

    def follow(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def run(self, fn: Callable[[], None]) -> None:
        with torch.cuda.stream(self._stream):
            fn()

    def join(self) -> None:
        torch.cuda.current_stream(self._device).wait_stream(self._stream)


def overlapped(y: torch.Tensor, starts: tuple[int, ...], produce: Produce, summed: Sums, lane: Lane) -> None:
    """Produce y by parts and sum each over ranks while the next is produced. May be captured: the lane forks and joins.

    Args:
        y: ``[T, n]`` contiguous; holds the sum when what follows on the current stream begins.
        starts: of :func:`bounds`.
        produce: each rank's own summand: the product alone or with its partial delta (`add`), rank rows as further
            columns (`ride`).
        summed: called once a part, in order, the same on all ranks.
    """
    try:
        for index, (begin, end) in enumerate(pairwise(starts)):
            produce(begin, end)
            lane.follow()
            part, place = y[begin:end], index

            def reduce(part: torch.Tensor = part, place: int = place) -> None:
                summed(part, place)

            lane.run(reduce)
    finally:
        # Also after an error: memory of y goes back to the current stream's pool.
        lane.join()
