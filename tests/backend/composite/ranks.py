"""What the ranks of the communicator's tests run: importable, because each rank is a fresh process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.multiprocessing as processes

from polyaccel.backend.backend import RankAddress
from polyaccel.backend.composite.communicator import TorchCommunicator

RankFunction = Callable[[TorchCommunicator], object]


def _main(rank: int, world_size: int, folder: str, timeout: float, fn: RankFunction) -> None:
    torch.set_num_threads(1)
    address = RankAddress(rank=rank, world_size=world_size, init_method=f"file://{folder}/rendezvous", timeout=timeout)
    comm = TorchCommunicator(address)
    try:
        torch.save(fn(comm), Path(folder) / f"result-{rank}.pt")
    finally:
        comm.close()
        comm.close()


def run_ranks(fn: RankFunction, world_size: int, folder: Path, *, timeout: float = 60.0) -> list[object]:
    """What ``fn`` returned on each rank."""
    folder.mkdir(exist_ok=True)
    processes.spawn(_main, (world_size, str(folder), timeout, fn), nprocs=world_size)
    return [torch.load(folder / f"result-{rank}.pt", weights_only=True) for rank in range(world_size)]


def operand(rank: int, dtype: torch.dtype) -> torch.Tensor:
    """Each rank's own values, of very different sizes so that the order of a sum shows."""
    generator = torch.Generator().manual_seed(rank)
    return (torch.randn(37, 5, generator=generator) * 10.0 ** torch.randint(-4, 5, (37, 5), generator=generator)).to(
        dtype
    )


def every_collective(comm: TorchCommunicator) -> dict[str, object]:
    rank, world = comm.rank, comm.world_size
    comm.trace = []
    result: dict[str, object] = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = operand(rank, dtype)
        assert comm.all_reduce(x) is x
        result[f"all_reduce {dtype}"] = x
    wide = torch.full((3, 4), float(rank))
    comm.all_reduce(wide[:, 1:3])
    result["all_reduce of a view"] = wide
    result["all_gather last"] = comm.all_gather(torch.full((2, 3), rank))
    result["all_gather first"] = comm.all_gather(torch.full((2, 3), rank), 0)
    own = comm.reduce_scatter(torch.arange(2.0 * world).view(-1, 1) + rank)
    result["reduce_scatter"], result["reduce_scatter held"] = own, own.untyped_storage().nbytes()
    # Rank r sends r + s rows to rank s.
    send, receive = [rank + s for s in range(world)], [r + rank for r in range(world)]
    rows = torch.cat([torch.full((n, 2), 10 * rank + s) for s, n in enumerate(send)])
    result["all_to_all"] = comm.all_to_all(rows, send, receive)
    value = torch.full((3,), rank)
    assert comm.broadcast(value, world - 1) is value
    result["broadcast"] = value
    comm.barrier()
    result["trace"] = [(c.kind, c.nbytes) for c in comm.trace]
    result["objects"] = comm.gather_objects({"rank": rank, "text": "x" * 100 * rank})
    return result
