"""One rank of a sum in Triton's interpreter: ``python -m tests.cuda.one_shot_rank RANK WORLD FOLDER``.

Ranks are processes that map the same files. Prints one line for each thing that is wrong, then ``done``.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import torch

from polyaccel_cuda.kernels import one_shot

COUNTS = (1, 5, 231, 1500, 5000, 64, 5000)
TIMES = 3
"""Sums on one buffer, back to back."""


def drawn(count: int, rank: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * count + rank)
    return torch.randn(count, generator=generator).to(dtype)


def expected(parts: list[torch.Tensor]) -> list[torch.Tensor]:
    """What every rank has after a sum in the order of ranks."""
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return [total.to(parts[0].dtype)] * len(parts)


def main(rank: int, world: int, folder: Path) -> None:
    def shared(name: str) -> torch.Tensor:
        return torch.from_file(str(folder / name), shared=True, size=one_shot.BUFFER_BYTES, dtype=torch.uint8)

    buffers = [shared(f"rank{r}") for r in range(world)]
    peers = tuple(buffer.data_ptr() for buffer in buffers)
    rounds = torch.zeros(one_shot.PROGRAMS, dtype=torch.int64)
    given_up = torch.zeros(1, dtype=torch.int32)
    for dtype in (torch.float32, torch.float16):
        for count in COUNTS:
            parts = [drawn(count, r, dtype) for r in range(world)]
            x = parts[rank].clone()
            for _ in range(TIMES):
                parts = expected(parts)
                one_shot.one_shot_all_reduce(x, rank, peers, rounds, given_up)
            if not torch.equal(x, parts[rank]):
                print(f"{count} of {dtype}: {x[:3]} for {parts[rank][:3]}", flush=True)
    if rank == 0:
        # Nobody else comes any more.
        threading.Timer(0.5, lambda: given_up.fill_(1)).start()
        x, before = torch.ones(5000), rounds.clone()
        for least, most in ((0.4, 20.0), (0.0, 0.4)):
            begun = time.monotonic()
            one_shot.one_shot_all_reduce(x, rank, peers, rounds, given_up)
            if not least <= time.monotonic() - begun <= most:
                print(f"gave up after {time.monotonic() - begun:.2f} s", flush=True)
        programs = -(-5000 * 4 // one_shot.CHUNK_BYTES)
        if (rounds[:programs] != -1).any() or (rounds[programs:] != before[programs:]).any():
            print(f"rounds {rounds[:8].tolist()}", flush=True)
    print("done", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
