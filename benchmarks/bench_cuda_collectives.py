"""Sums over GPUs in a graph: NCCL, our one-shot and two-shot kernels, torch's, and what the communicator picks.

    python benchmarks/bench_cuda_collectives.py [--world 2] [--kib 4 8 16 ... 8192]

Starts one process a GPU. bfloat16, in place, 20 sums a graph, the best of 10 replays, the slowest rank. Before it is
timed each form must give the same sum of random numbers as float64, and the same bits on all ranks; a form that does
not is listed with the reason instead of a time. ``bus_gb_s``: bytes that a GPU has to receive at least, by the time.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import save

from polyaccel.backend import RankAddress

CALLS, REPEATS = 20, 10
Sum = Callable[[torch.Tensor], torch.Tensor]


def torch_forms(rank: int, world: int, folder: Path, device: torch.device) -> dict[str, Sum]:
    """torch's own symmetric-memory sums; none of them if that memory cannot be had."""
    import torch.distributed as dist
    import torch.distributed._symmetric_memory as symmetric

    os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
    dist.init_process_group("nccl", init_method=f"file://{folder}/torch", rank=rank, world_size=world, device_id=device)
    name = dist.group.WORLD.group_name  # type: ignore[union-attr]
    shared = symmetric.empty(8 << 20, dtype=torch.bfloat16, device=device)
    symmetric.rendezvous(shared, name)

    def one_shot(x: torch.Tensor) -> torch.Tensor:
        part = shared[: x.numel()]
        part.copy_(x)
        return torch.ops.symm_mem.one_shot_all_reduce(part, "sum", name)  # type: ignore[no-any-return]

    def two_shot(x: torch.Tensor) -> torch.Tensor:
        part = shared[: x.numel()]
        part.copy_(x)
        return torch.ops.symm_mem.two_shot_all_reduce_(part, "sum", name)  # type: ignore[no-any-return]

    return {"torch_one_shot_and_copy": one_shot, "torch_two_shot_and_copy": two_shot}


def timed(form: Sum, x: torch.Tensor) -> float:
    """Microseconds a sum."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        form(x)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        for _ in range(CALLS):
            form(x)
    best = float("inf")
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end) * 1e3 / CALLS)
    graph.reset()
    return best


def wrong(comm: Any, form: Sum, count: int, rank: int, world: int, device: torch.device) -> str:
    """What is wrong with a form's sum, empty if nothing is."""
    parts = [
        torch.randn(count, generator=torch.Generator().manual_seed(r)).to(torch.bfloat16).to(device)
        for r in range(world)
    ]
    for _ in range(3):
        got = form(parts[rank].clone()).clone()
    torch.cuda.synchronize()
    wanted = torch.stack(parts).double().sum(0)
    bound = torch.stack(parts).double().abs().sum(0) * world * 2**-8
    bits = got.view(torch.int16).cpu().numpy().tobytes()
    if len(set(comm.gather_objects(bits))) > 1:
        return "ranks differ"
    return "" if ((got.double() - wanted).abs() <= bound).all() else "not the sum"


def run_rank(rank: int, world: int, folder: Path, sizes: list[int]) -> list[dict[str, object]]:
    from polyaccel_cuda.backend import CudaBackend

    backend = CudaBackend()
    device = backend.devices()[rank].torch_device
    torch.cuda.set_device(device)
    address = RankAddress(rank=rank, world_size=world, init_method=f"file://{folder}/ours", timeout=60.0)
    comm: Any = backend.connect(address)
    said = {"what": "communicator", "ranks": world, "sums": comm.describe(), "threshold_bytes": comm.threshold}
    rows: list[dict[str, object]] = [{**said, "nccl": str(torch.cuda.nccl.version())}]

    def by(fn: Callable[[torch.Tensor], object]) -> Sum:
        def form(x: torch.Tensor) -> torch.Tensor:
            fn(x)
            return x

        return form

    forms: dict[str, Sum] = {"chosen": by(comm.all_reduce), "nccl": by(comm._nccl.all_reduce)}
    if comm._one_shot is not None:
        # Two-shot by as many programs as it takes, and by half of them.
        forms["one_shot"] = by(comm._one_shot.all_reduce)
        forms["two_shot"] = by(comm._one_shot.two_shot)
        forms["two_shot_64"] = by(lambda x: comm._one_shot.two_shot(x, 64))
    try:
        theirs = torch_forms(rank, world, folder, device)
        reason = ""
    except Exception as error:
        theirs, reason = {}, f"{type(error).__name__}: {error}"
    reasons = [str(r) for r in comm.gather_objects(reason) if r]
    if reasons:
        rows.append({"what": "torch's forms", "refused": reasons[0]})
    else:
        forms |= theirs
    for size in sizes:
        row: dict[str, object] = {"what": "all_reduce", "ranks": world, "kib": size / 1024}
        for name, form in forms.items():
            x = torch.zeros(size // 2, dtype=torch.bfloat16, device=device)
            if name == "one_shot" and not comm._one_shot.takes(x):
                continue
            if name.startswith("two_shot") and size > comm._one_shot.two_shot_bytes >> (name != "two_shot"):
                continue
            answers = comm.gather_objects(wrong(comm, form, size // 2, rank, world, device))
            found = next((str(answer) for answer in answers if answer), "")
            if found:
                row[name] = found
                continue
            slowest = max(float(us) for us in comm.gather_objects(timed(form, x)))
            row[f"{name}_us"] = round(slowest, 2)
            row[f"{name}_bus_gb_s"] = round(2 * (world - 1) / world * size / slowest / 1e3, 1)
        rows.append(row)
        if rank == 0:
            print(row, flush=True)
    comm.close()
    backend.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--kib", type=int, nargs="+", default=[4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--seconds", type=float, default=120.0, help="after which ranks that have not ended are killed")
    parser.add_argument("--no-save", action="store_true", help="print only, write no file")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        sizes = [kib << 10 for kib in arguments.kib]
        rows = run_rank(arguments.rank, arguments.world, arguments.folder, sizes)
        if arguments.rank == 0:
            name = f"{torch.cuda.get_device_name()} x{arguments.world}"
            save("cuda_collectives", rows, enabled=not arguments.no_save, device=name)
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
