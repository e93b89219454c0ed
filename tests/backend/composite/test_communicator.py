from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from polyaccel.backend.backend import RankAddress
from polyaccel.backend.composite.communicator import TorchCommunicator
from polyaccel.backend.errors import CommunicationError, ConfigurationError
from tests.backend.composite.ranks import every_collective, operand, run_ranks


def in_threads(world: int, address: Any, fn: Any) -> list[Any]:
    """Ranks as threads of this process, each with a group of its own."""
    found: list[Any] = [None] * world

    def main(rank: int) -> None:
        try:
            found[rank] = fn(TorchCommunicator(address(rank)))
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=main, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


def by_file(folder: Path, world: int, timeout: float = 60) -> Callable[[int], RankAddress]:
    def address(rank: int) -> RankAddress:
        return RankAddress(rank=rank, world_size=world, init_method=f"file://{folder}/rendezvous", timeout=timeout)

    return address


@pytest.mark.parametrize(("world", "processes"), [(2, True), (3, False)])
def test_every_collective(world: int, processes: bool, tmp_path: Path) -> None:
    if processes:
        ranks: list[Any] = run_ranks(every_collective, world, tmp_path)
    else:
        ranks = in_threads(world, by_file(tmp_path, world), every_collective)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        operands = [operand(r, dtype) for r in range(world)]
        total = sum(x.double() for x in operands)
        size = sum(x.double().abs() for x in operands)
        sums = [r[f"all_reduce {dtype}"] for r in ranks]
        assert all(torch.equal(s.view(torch.uint8), sums[0].view(torch.uint8)) for s in sums)
        assert bool(((sums[0].double() - total).abs() <= world * torch.finfo(dtype).eps * size).all())
    for rank, result in enumerate(ranks):
        middle = float(sum(range(world)))
        assert result["all_reduce of a view"].tolist() == [[rank, middle, middle, rank]] * 3
        assert result["all_gather last"].tolist() == [[r for r in range(world) for _ in range(3)]] * 2
        assert result["all_gather first"].tolist() == [[r] * 3 for r in range(world) for _ in range(2)]
        expected = [world * (2 * rank + i) + middle for i in range(2)]
        assert result["reduce_scatter"].flatten().tolist() == expected
        assert result["reduce_scatter held"] == 2 * 4, "the other ranks' rows are kept alive"
        expected_rows = [[10 * r + rank] * 2 for r in range(world) for _ in range(r + rank)]
        assert result["all_to_all"].tolist() == expected_rows
        assert result["broadcast"].tolist() == [world - 1] * 3
        assert result["objects"] == [{"rank": r, "text": "x" * 100 * r} for r in range(world)]
        assert [kind for kind, _ in result["trace"]] == [
            *["all_reduce"] * 4,
            "all_gather",
            "all_gather",
            "reduce_scatter",
            "all_to_all",
            "broadcast",
            "barrier",
        ]
        assert result["trace"][0][1] == 37 * 5 * 4


def test_groups_of_one_process_do_not_meet_and_the_default_group_stays_unset(tmp_path: Path) -> None:
    def sums(first: TorchCommunicator) -> tuple[list[float], bool]:
        address = RankAddress(rank=first.rank, world_size=2, init_method=f"file://{tmp_path}/second", timeout=30)
        second = TorchCommunicator(address)
        values = [c.all_reduce(torch.tensor([float(v)])).item() for c, v in ((first, 1), (second, 10), (first, 2))]
        initialised = torch.distributed.is_initialized()
        first.close()
        values.append(second.all_reduce(torch.tensor([7.0])).item())
        second.close()
        return values, initialised

    assert in_threads(2, by_file(tmp_path, 2), sums) == [([2.0, 20.0, 4.0, 14.0], False)] * 2


def test_ranks_meet_over_tcp() -> None:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def address(rank: int) -> RankAddress:
        return RankAddress(rank=rank, world_size=2, init_method=f"tcp://127.0.0.1:{port}", timeout=30)

    def gather(comm: TorchCommunicator) -> object:
        found = comm.gather_objects(comm.rank)
        comm.close()
        return found

    assert in_threads(2, address, gather) == [[0, 1], [0, 1]]


def test_a_rank_that_never_arrives_is_named(tmp_path: Path) -> None:
    address = RankAddress(rank=1, world_size=3, init_method=f"file://{tmp_path}/rendezvous", timeout=0.5)
    with pytest.raises(CommunicationError, match=r"connect on rank 1.*\[0, 2\] of 3.*0\.5 s"):
        TorchCommunicator(address)


def test_a_rank_that_stays_silent_is_an_error_within_the_timeout(tmp_path: Path) -> None:
    failed = threading.Event()

    def all_but_one(comm: TorchCommunicator) -> str:
        comm.barrier()
        if comm.rank == 1:
            failed.wait(50)
            return ""
        with pytest.raises(CommunicationError) as caught:
            comm.all_reduce(torch.ones(8))
        failed.set()
        return str(caught.value)

    message = in_threads(2, by_file(tmp_path, 2, timeout=1.5), all_but_one)[0]
    assert "all_reduce on rank 0 of 2" in message
    assert "timeout 1.5 s" in message


def test_a_rank_that_leaves_is_an_error_not_a_hang(tmp_path: Path) -> None:
    def all_but_one(comm: TorchCommunicator) -> str:
        comm.barrier()
        if comm.rank == 1:
            comm.close()
            return ""
        with pytest.raises(CommunicationError) as caught:
            comm.all_reduce(torch.ones(8))
        return str(caught.value)

    message = in_threads(2, by_file(tmp_path, 2, timeout=5), all_but_one)[0]
    assert "all_reduce on rank 0 of 2" in message


def test_a_closed_group_refuses_collectives(tmp_path: Path) -> None:
    comm = TorchCommunicator(RankAddress(rank=0, world_size=1, init_method=f"file://{tmp_path}/one", timeout=10))
    assert comm.all_reduce(torch.ones(1)).item() == 1.0
    comm.close()
    comm.close()
    with pytest.raises(CommunicationError, match="closed"):
        comm.all_reduce(torch.ones(1))


@pytest.mark.parametrize(
    ("init_method", "rank", "transport"),
    [("env://", 0, "gloo"), ("tcp://host", 0, "gloo"), ("file:///somewhere", 2, "gloo")],
)
def test_addresses_that_cannot_work_are_refused(init_method: str, rank: int, transport: str) -> None:
    with pytest.raises(ConfigurationError):
        TorchCommunicator(RankAddress(rank=rank, world_size=2, init_method=init_method, timeout=1), transport)


def test_an_unknown_transport_is_refused_by_name(tmp_path: Path) -> None:
    address = RankAddress(rank=0, world_size=1, init_method=f"file://{tmp_path}/one", timeout=5)
    with pytest.raises(ConfigurationError, match="carrier-pigeon"):
        TorchCommunicator(address, "carrier-pigeon")


def test_counts_that_do_not_add_up_are_refused(tmp_path: Path) -> None:
    comm = TorchCommunicator(RankAddress(rank=0, world_size=1, init_method=f"file://{tmp_path}/one", timeout=10))
    with pytest.raises(ConfigurationError, match=r"\[2\] rows of 3"):
        comm.all_to_all(torch.ones(3, 1), [2], [2])
    with pytest.raises(ConfigurationError, match="counts"):
        comm.all_to_all(torch.ones(3, 1), [3, 0], [3, 0])
    for source in (1, 4):
        with pytest.raises(ConfigurationError, match=f"rank {source}"):
            comm.broadcast(torch.ones(1), source)
    comm.close()


def test_a_process_that_forgets_to_close_still_exits(tmp_path: Path) -> None:
    code = (
        "import torch; from polyaccel.backend import RankAddress;"
        "from polyaccel.backend.composite.communicator import TorchCommunicator;"
        f"c = TorchCommunicator(RankAddress(rank=0, world_size=1, init_method='file://{tmp_path}/one', timeout=10));"
        "c.all_reduce(torch.ones(1)); print('done')"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert finished.stdout.strip() == "done"
