"""Row-parallel layers at prefill on several GPUs: the product, the sum over ranks, and both beside one another.

    python benchmarks/bench_cuda_row_parallel.py [--world 2] [--rows 256 1024 4096] [--k 4096] [--n 8192]

Starts one process a GPU. bfloat16, every call with other weights, in a graph, the best of the repeats, the slowest
rank, microseconds. Before a form is timed its sums must be right, the same bits on all ranks and in 20 runs; a form
that is not is listed with the reason. ``torch_then_nccl`` is what torch takes one after the other; ``chosen`` is what
the backend does. ``push_4`` is four parts whose sums are pushed, ``nccl_4`` by NCCL, ``two_shot_4_16`` by 16 programs
of the two-shot kernel. ``last_2x384``: two parts of 384 rows that are pushed, and the rest by two-shot when no product
is left for it to disturb. ``sum_*`` is the sum alone, ``eager``: the chosen form without a graph, the host included.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from common import save
from torch.nn.functional import linear

from polyaccel.backend import RankAddress

WEIGHTS = 4
"""Matrices that calls of one graph take in turn, more than the cache holds."""
Call = Callable[[int], torch.Tensor]
"""Of the number of the matrix."""


class Layer:
    """The forms of one layer on one rank."""

    def __init__(self, comm: Any, rows: int, k: int, n: int, device: torch.device, repeats: int) -> None:
        generator = torch.Generator(device).manual_seed(7 + comm.rank)

        def drawn(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16) * k**-0.25

        self.comm, self.rows, self.n, self.device, self.repeats = comm, rows, n, device, repeats
        self.x, self.w = drawn(rows, k), [drawn(n, k) for _ in range(WEIGHTS)]
        self.y = torch.empty(rows, n, dtype=torch.bfloat16, device=device)
        self.nbytes = rows * n * 2

    def parts(self, count: int) -> tuple[int, ...]:
        """Of equal size but for the last, in tiles."""
        from polyaccel_cuda.overlap import TILE_ROWS

        blocks = -(-self.rows // TILE_ROWS)
        small, more = divmod(blocks, count)
        return (*(TILE_ROWS * (i * small + min(i, more)) for i in range(count)), self.rows)

    def multiply(self, i: int, begin: int, end: int) -> None:
        from polyaccel_cuda.row_parallel import product_into

        product_into(self.x[begin:end], self.w[i % WEIGHTS], None, self.y[begin:end])

    def summed_by(self, form: str, programs: int = 64) -> Callable[[torch.Tensor, int], None]:
        ours, nccl = self.comm._one_shot, self.comm._nccl

        def push(part: torch.Tensor, index: int) -> None:
            ours.push(part, index % 2)
            ours.meet()
            ours.add_received(part, index % 2)

        def by_nccl(part: torch.Tensor, index: int) -> None:
            nccl.all_reduce(part)

        def two_shot(part: torch.Tensor, index: int) -> None:
            ours.two_shot(part, programs)

        return {"push": push, "nccl": by_nccl, "two_shot": two_shot}[form]

    def overlapped(self, starts: tuple[int, ...], summed: Callable[[torch.Tensor, int], None]) -> Call:
        from polyaccel_cuda import overlap

        lane = overlap.SideStream(self.device)

        def call(i: int) -> torch.Tensor:
            def produce(begin: int, end: int) -> None:
                self.multiply(i, begin, end)

            overlap.overlapped(self.y, starts, produce, summed, lane)
            return self.y

        return call

    def chosen(self, i: int) -> torch.Tensor:
        starts = self.comm.parts(self.rows, self.n, torch.bfloat16)
        if len(starts) <= 2:
            self.multiply(i, 0, self.rows)
            return self.comm.all_reduce(self.y)  # type: ignore[no-any-return]
        self.comm.sum_in_parts(self.y, starts, lambda begin, end: self.multiply(i, begin, end))
        return self.y

    def torch_then_nccl(self, i: int) -> torch.Tensor:
        y = linear(self.x, self.w[i % WEIGHTS])
        self.comm._nccl.all_reduce(y)
        return y

    def forms(self) -> Iterator[tuple[str, Call]]:
        yield "torch_then_nccl", self.torch_then_nccl
        yield "chosen", self.chosen
        ours, blocks = self.comm._one_shot, -(-self.rows // 128)
        for count in (2, 4, 8, 16):
            part = -(-blocks // count) * 128 * self.n * 2
            if count > blocks or part < 1 << 20:
                continue
            if ours is not None and ours.pushes and part <= 16 << 20:
                yield f"push_{count}", self.overlapped(self.parts(count), self.summed_by("push"))
            if count <= 4:
                yield f"nccl_{count}", self.overlapped(self.parts(count), self.summed_by("nccl"))
            for programs in (32, 64, 128):
                if ours is not None and part <= programs << 17 and part >= 2 << 20:
                    name = f"two_shot_{count}_{programs}"
                    yield name, self.overlapped(self.parts(count), self.summed_by("two_shot", programs))

        if ours is not None and ours.pushes and ours.two_shot_bytes:
            for count, part, starts in self.unequal(min(16 << 20, ours.two_shot_bytes)):
                yield f"last_{count}x{part}", self.overlapped(starts, self.pushed_but_last(count))

    def unequal(self, most_bytes: int) -> Iterator[tuple[int, int, tuple[int, ...]]]:
        """Some equal parts and a last one: their number, their rows, and where all begin and end."""
        for count in (1, 2, 3, 4):
            for part in range(256, self.rows, 128):
                rest = self.rows - count * part
                fits = max(part, rest) * self.n * 2 <= most_bytes
                if fits and self.rows // 8 <= rest <= 2 * part and part <= 3 * rest:
                    yield count, part, (*(part * i for i in range(count + 1)), self.rows)

    def pushed_but_last(self, count: int) -> Callable[[torch.Tensor, int], None]:
        push, two_shot = self.summed_by("push"), self.summed_by("two_shot", 128)
        return lambda part, index: (push if index < count else two_shot)(part, index)

    def sums(self) -> Iterator[tuple[str, Call]]:
        """The sum alone, of whatever y holds."""

        def alone(starts: tuple[int, ...], summed: Callable[[torch.Tensor, int], None]) -> Call:
            def call(i: int) -> torch.Tensor:
                for index, (begin, end) in enumerate(pairwise(starts)):
                    summed(self.y[begin:end], index)
                return self.y

            return call

        def product(i: int) -> torch.Tensor:
            self.multiply(i, 0, self.rows)
            return self.y

        yield "product", product
        yield "sum_nccl", alone((0, self.rows), self.summed_by("nccl"))
        ours = self.comm._one_shot
        if ours is not None and ours.pushes:
            count = max(2, -(-self.nbytes // (8 << 20)))
            yield "sum_push", alone(self.parts(count + count % 2), self.summed_by("push"))
        if ours is not None and self.nbytes <= ours.two_shot_bytes:
            for programs in (32, 64, 128):
                if self.nbytes <= programs << 17:
                    yield f"sum_two_shot_{programs}", alone((0, self.rows), self.summed_by("two_shot", programs))

    def wrong(self, call: Call) -> str:
        """What is wrong, empty if nothing is."""
        mine = linear(self.x, self.w[1])
        each = self.comm._nccl.all_gather(mine)
        wanted, bound = each.double().sum(0), each.double().abs().sum(0) * 2**-6 + 2**-6
        first = call(1).clone()
        if not ((first.double() - wanted).abs() <= bound).all():
            return "not the sum"
        for _ in range(20):
            call(0)
            if not torch.equal(call(1), first):
                return "another sum in another run"
        whole = self.comm._nccl.all_gather(first)
        return "" if all(torch.equal(whole[0], other) for other in whole[1:]) else "ranks differ"

    def timed(self, call: Call, calls: int = 8) -> float:
        """Microseconds a call, in a graph."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call(0)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            for i in range(calls):
                call(i)
        best = float("inf")
        for _ in range(self.repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            best = min(best, begin.elapsed_time(end) * 1e3 / calls)
        graph.reset()
        return best

    def eager(self, call: Call, calls: int = 20) -> float:
        for i in range(3):
            call(i)
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for i in range(calls):
            call(i)
        torch.cuda.synchronize()
        return (time.perf_counter() - begun) / calls * 1e6


def run_rank(rank: int, world: int, folder: Path, arguments: argparse.Namespace) -> list[dict[str, object]]:
    from polyaccel_cuda.backend import CudaBackend

    backend = CudaBackend()
    device = backend.devices()[rank].torch_device
    torch.cuda.set_device(device)
    address = RankAddress(rank=rank, world_size=world, init_method=f"file://{folder}/ours", timeout=60.0)
    comm: Any = backend.connect(address)
    said = f"{comm.describe()}; parts: {comm.describe_parts()}"
    rows: list[dict[str, object]] = [{"what": "communicator", "ranks": world, "sums": said}]
    print(said, flush=True)

    def slowest(us: float) -> float:
        return round(max(float(other) for other in comm.gather_objects(us)), 1)

    for tokens in arguments.rows:
        layer = Layer(comm, tokens, arguments.k, arguments.n, device, arguments.repeats)
        row: dict[str, object] = {"what": "row_parallel", "rows": tokens, "k": arguments.k, "n": arguments.n}
        for name, call in layer.forms():
            if arguments.only and not any(name.startswith(prefix) for prefix in arguments.only):
                continue
            found = next((str(a) for a in comm.gather_objects(layer.wrong(call)) if a), "")
            row[name] = found or slowest(layer.timed(call))
        row["eager"] = slowest(layer.eager(layer.chosen))
        for name, call in layer.sums():
            layer.y.zero_()
            row[name] = slowest(layer.timed(call))
        rows.append(row)
        if rank == 0:
            print(row, flush=True)
    comm.close()
    backend.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--rows", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--k", type=int, default=4096, help="columns of a rank's share of the weight")
    parser.add_argument("--n", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--only", nargs="*", default=[], help="forms whose names begin like this")
    parser.add_argument("--seconds", type=float, default=150.0, help="after which ranks that have not ended are killed")
    parser.add_argument("--no-save", action="store_true", help="print only, write no file")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        rows = run_rank(arguments.rank, arguments.world, arguments.folder, arguments)
        if arguments.rank == 0:
            name = f"{torch.cuda.get_device_name()} x{arguments.world}"
            save("cuda_row_parallel", rows, enabled=not arguments.no_save, device=name)
        sys.stdout.flush()
        os._exit(0)
    with tempfile.TemporaryDirectory() as folder:
        own = [sys.executable, __file__, *sys.argv[1:], "--folder", folder, "--rank"]
        ranks = [subprocess.Popen([*own, str(rank)]) for rank in range(arguments.world)]
        try:
            codes = [rank.wait(arguments.seconds) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
    if any(codes):
        raise SystemExit(f"ranks ended with {codes}")


if __name__ == "__main__":
    main()
