"""One rank of kernels that exchange data, interpreted: ``python -m tests.cuda.exchange_rank WHAT RANK WORLD FOLDER``.

Ranks are processes that map the same files. Prints one line for each thing that is wrong, then ``done``.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import torch

from polyaccel_cuda import overlap, symmetric
from polyaccel_cuda.kernels import norm, reduce_norm, two_shot
from polyaccel_cuda.symmetric import OneShot
from tests.cuda.one_shot_rank import drawn, expected

DTYPES = (torch.float32, torch.float16)
TIMES = 3
"""Sums on one buffer, back to back."""


class Here:
    """A rank's sums over mapped files."""

    def __init__(self, rank: int, world: int, folder: Path) -> None:
        self.rank, self.world = rank, world
        size = symmetric.places(world).total
        buffers = [
            torch.from_file(str(folder / f"rank{r}"), shared=True, size=size, dtype=torch.uint8) for r in range(world)
        ]
        handle = SimpleNamespace(get_buffer=lambda peer, shape, dtype: buffers[peer])
        self.sums = OneShot("files", None, handle, buffers[rank], rank, world)

    def same(self, what: str, got: torch.Tensor, wanted: torch.Tensor) -> None:
        if not torch.equal(got, wanted):
            print(f"{what}: {got.flatten()[:3]} for {wanted.flatten()[:3]}", flush=True)


def two_shots(here: Here) -> None:
    """Of one program and several, of more chunks than programs, with shares that are short or empty."""
    for dtype in DTYPES:
        for count, programs in ((1, 64), (5, 64), (4097, 64), (20_000, 64), (50_001, 2), (4097, 1), (50_001, 3)):
            parts = [drawn(count, r, dtype) for r in range(here.world)]
            x = parts[here.rank].clone()
            for _ in range(TIMES):
                parts = expected(parts)
                here.sums.two_shot(x, programs)
            here.same(f"{count} of {dtype} by {programs}", x, parts[here.rank])


def norms(here: Here) -> None:
    """The bits of the sum followed by the kernel that adds and norms; widths and rows change from call to call."""
    for dtype in DTYPES:
        for rows, n in ((1, 256), (3, 130), (1, 1), (7, 1000), (2, 2048), (1, 2050)):
            wide = [drawn(rows * (n + 3), r, dtype).view(rows, n + 3)[:, :n] for r in range(here.world)]
            residual = drawn(rows * 2 * n, 90, dtype).view(rows, 2 * n)[:, :n]
            weight = drawn(n, 91, dtype)
            normed, total = here.sums.reduce_add_norm(wide[here.rank], residual, weight, 1e-5)
            wanted = norm.rms_norm(expected([part.contiguous() for part in wide])[0], weight, 1e-5, residual)
            here.same(f"norm of {rows} x {n} {dtype}", normed, wanted[0])
            assert wanted[1] is not None
            here.same(f"total of {rows} x {n} {dtype}", total, wanted[1])


class InLine:
    """A lane without a device: everything at once, in order, counted."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def follow(self) -> None:
        self.calls.append("follow")

    def run(self, fn: Callable[[], None]) -> None:
        self.calls.append("run")
        fn()

    def join(self) -> None:
        self.calls.append("join")


def parts(here: Here) -> None:
    """Products whose rank rows ride, and with partial deltas added, by parts of every number that bounds give."""
    assert here.world == 2
    tile = overlap.TILE_ROWS
    for dtype in DTYPES:
        for rows, starts in ((2 * tile, (0, tile, 2 * tile)), (500, (0, tile, 2 * tile, 3 * tile, 500))):
            for form in ("ride", "add"):
                k, n, rank_rows = 8, 24, 8 if form == "ride" else 0
                x, w, a, b = ([drawn(r * c, 10 * i + s, dtype).view(r, c) for s in range(2)] for i, (r, c) in
                              enumerate(((rows, k), (n + rank_rows, k), (4, k), (n, 4))))  # fmt: skip

                def product(s: int, begin: int, end: int) -> torch.Tensor:
                    y = x[s][begin:end] @ w[s].T  # noqa: B023
                    return y if form == "ride" else y + (x[s][begin:end] @ a[s].T) @ b[s].T  # noqa: B023

                y, lane = torch.empty(rows, n + rank_rows, dtype=dtype), InLine()

                def produce(begin: int, end: int) -> None:
                    y[begin:end].copy_(product(here.rank, begin, end))  # noqa: B023

                def summed(part: torch.Tensor, index: int) -> None:
                    here.sums.push(part, index % 2)
                    here.sums.meet()
                    here.sums.add_received(part, index % 2)

                for _ in range(TIMES):
                    overlap.overlapped(y, starts, produce, summed, lane)
                each = [expected([product(s, i, j) for s in range(2)])[0] for i, j in pairwise(starts)]
                here.same(f"{rows} rows of {dtype}, {form}", y, torch.cat(each))
                assert lane.calls == (["follow", "run"] * (len(starts) - 1) + ["join"]) * TIMES


def nobody_waits_for_ever(here: Here) -> None:
    """After the last call that all ranks make."""
    if here.rank:
        return
    threading.Timer(0.5, here.sums.abort).start()
    calls: tuple[Callable[[], object], ...] = (
        lambda: here.sums.two_shot(torch.ones(5000)),
        lambda: here.sums.two_shot(torch.ones(5000)),
        lambda: here.sums.reduce_add_norm(torch.ones(2, 8), torch.ones(2, 8), torch.ones(8), 1e-5),
        lambda: here.sums.meet() if here.sums.pushes else None,
    )
    for i, call in enumerate(calls):
        begun = time.monotonic()
        call()
        least, most = (0.4, 20.0) if i == 0 else (0.0, 10.0)
        if not least <= time.monotonic() - begun <= most:
            print(f"call {i} gave up after {time.monotonic() - begun:.2f} s", flush=True)
    if here.sums._two_shot_rounds[0] != -1 or here.sums._norm_rounds[0] != -1:
        print("rounds go on", flush=True)


CASES = {"two_shots": two_shots, "norms": norms, "parts": parts}


def main(what: str, rank: int, world: int, folder: Path) -> None:
    assert two_shot.PROGRAMS >= 3
    assert reduce_norm.MOST_ROWS >= 7
    here = Here(rank, world, folder)
    CASES[what](here)
    nobody_waits_for_ever(here)
    print("done", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
