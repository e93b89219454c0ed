"""How ranks of the CUDA backend choose, agree and give up. No kernel runs here and no GPU is asked for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import torch.distributed as dist

from polyaccel.backend import CommunicationError, Launcher, Ledger, RankAddress
from polyaccel.backend.errors import ConfigurationError
from polyaccel_cuda import communicator
from polyaccel_cuda.backend import CudaBackend
from polyaccel_cuda.communicator import CudaCommunicator, shared_device
from polyaccel_cuda.symmetric import NumberedStore, open_one_shot
from polyaccel_cuda.threshold import largest_winning
from polyaccel_cuda.watch import Watch

R = TypeVar("R")
CPU = torch.device("cpu")


def on_ranks(folder: Path, fn: Callable[[CudaCommunicator], R], world: int = 2, device: torch.device = CPU) -> list[R]:
    """What ``fn`` returns on each rank; the ranks are threads."""
    found: dict[int, R] = {}
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            address = RankAddress(rank=rank, world_size=world, init_method=f"file://{folder}/store", timeout=20.0)
            group = CudaCommunicator(address, Launcher(Ledger()), device)
            try:
                found[rank] = fn(group)
            finally:
                group.close()
                group.close()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if errors:
        raise errors[0]
    return [found[rank] for rank in range(world)]


# -- without GPUs of their own -----------------------------------------------------------------------------------------


def test_ranks_without_a_gpu_talk_through_host_memory_and_say_why(tmp_path: Path) -> None:
    def talk(group: CudaCommunicator) -> tuple[object, ...]:
        x = torch.full((3, 2), group.rank + 1.0)
        group.all_reduce(x)
        gathered = group.all_gather(torch.full((2, 1), float(group.rank)), 1)
        group.barrier()
        ledger = group._launcher.ledger.counts()
        return x.tolist(), gathered.tolist(), group.transport, group.hosted, group.describe(), ledger

    first, second = on_ranks(tmp_path, talk)
    assert first == second
    total, gathered, transport, hosted, described, ledger = first
    assert (total, gathered, transport) == ([[3.0, 3.0]] * 3, [[0.0, 1.0]] * 2, "gloo")
    assert hosted in ("rank 0 has no GPU", "this torch has no NCCL")
    assert described == f"through host memory: {hosted}"
    assert ledger == {"cuda.host_all_reduce": 1, "cuda.host_all_gather": 1, "cuda.host_barrier": 1}


def test_a_backend_whose_ranks_share_no_link_refuses_graphs_and_native_collectives(tmp_path: Path) -> None:
    refusals: list[list[str]] = []

    def run(rank: int) -> None:
        backend = CudaBackend()
        assert backend.graph_refusals() == []
        store = f"file://{tmp_path}/store"
        group = backend.connect(RankAddress(rank=rank, world_size=2, init_method=store, timeout=20.0))
        refusals.append(backend.graph_refusals())
        entries = backend.table()["all_reduce"]
        refusals.append(list(entries[0].supports(None)))  # type: ignore[arg-type]
        group.close()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(refusals) == 4
    assert all(len(reasons) == 1 for reasons in refusals)
    assert sum("which no graph holds" in reasons[0] for reasons in refusals) == 2


def test_a_closed_group_says_so(tmp_path: Path) -> None:
    def leave(group: CudaCommunicator) -> bool:
        group.close()
        with pytest.raises(CommunicationError, match=r"all_reduce on rank \d: the group was closed"):
            group.all_reduce(torch.ones(2))
        return group.closed

    assert on_ranks(tmp_path, leave) == [True, True]


def test_an_address_outside_of_the_world_is_refused(tmp_path: Path) -> None:
    address = RankAddress(rank=2, world_size=2, init_method=f"file://{tmp_path}/store", timeout=1.0)
    with pytest.raises(ConfigurationError, match="rank 2 of a world of 2"):
        CudaCommunicator(address, Launcher(Ledger()), CPU)


def test_a_rank_that_does_not_come_is_named(tmp_path: Path) -> None:
    address = RankAddress(rank=0, world_size=2, init_method=f"file://{tmp_path}/store", timeout=0.5)
    with pytest.raises(CommunicationError, match=r"ranks \[1\] of 2 did not arrive"):
        CudaCommunicator(address, Launcher(Ledger()), CPU)


@pytest.mark.parametrize(
    ("uuids", "reason"),
    [
        (["a", "b"], ""),
        (["a", "b", "c", "d"], ""),
        (["a", "a"], "ranks 0 and 1 share one GPU"),
        (["a", "b", "c", "b"], "ranks 1 and 3 share one GPU"),
    ],
)
def test_ranks_that_share_a_gpu_are_found(uuids: list[str], reason: str) -> None:
    assert shared_device(uuids) == reason


# -- which sums are ours -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "threshold"),
    [
        ({8: (1.0, 2.0), 16: (1.0, 2.0), 32: (3.0, 2.0)}, 16),
        ({32: (3.0, 4.0), 8: (1.0, 2.0), 16: (3.0, 2.0)}, 8),
        ({8: (2.0, 1.0), 16: (1.0, 2.0)}, 0),
        ({8: (1.0, 1.0)}, 8),
        ({}, 0),
    ],
)
def test_the_threshold_is_the_last_size_before_nccl_wins(
    seconds: dict[int, tuple[float, float]], threshold: int
) -> None:
    assert largest_winning(seconds) == threshold


class _Group:
    """Stands for NCCL's group."""

    def __init__(self, *_: object) -> None:
        self.calls: list[str] = []

    def all_reduce(self, x: torch.Tensor) -> None:
        self.calls.append("nccl")

    def abort(self) -> None:
        self.calls.append("abort")


class _OneShot:
    two_shot_bytes = 0

    def __init__(self) -> None:
        self.calls: list[str] = []

    def takes(self, x: torch.Tensor) -> bool:
        return x.dtype != torch.int64

    def all_reduce(self, x: torch.Tensor) -> None:
        self.calls.append("one_shot")

    def abort(self) -> None:
        self.calls.append("abort")

    def close(self) -> None:
        self.calls.append("close")


class _Mark:
    """A mark that the device reaches at once."""

    def record(self) -> None:
        return None

    def query(self) -> bool:
        return True


@contextmanager
def _everywhere(device: object) -> Iterator[None]:
    yield


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Ranks that believe they have a GPU each, NCCL, and symmetric memory."""
    monkeypatch.setattr(communicator, "NcclGroup", _Group)
    monkeypatch.setattr(communicator, "open_one_shot", lambda *_: _OneShot())
    monkeypatch.setattr(CudaCommunicator, "_why_hosted", lambda self: "")
    monkeypatch.setattr(torch.cuda, "device", _everywhere)
    monkeypatch.setattr(torch.cuda, "Event", _Mark)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return monkeypatch


def test_all_ranks_take_the_threshold_of_rank_0(tmp_path: Path, pretended: pytest.MonkeyPatch) -> None:
    pretended.setattr(communicator, "measured_threshold", lambda device, rank, *_: 1000 * (rank + 1))
    found = on_ranks(tmp_path, lambda group: (group.threshold, group.refusal, group.transport, group.describe()), 3)
    assert found == [(1000, "", "nccl", "one_shot up to 1000 bytes, nccl beyond")] * 3


def test_what_one_rank_cannot_do_no_rank_does(tmp_path: Path, pretended: pytest.MonkeyPatch) -> None:
    def measured(device: torch.device, rank: int, *_: object) -> int:
        if rank == 1:
            raise RuntimeError("no kernel image\nand more")
        return 4096

    pretended.setattr(communicator, "measured_threshold", measured)
    found = on_ranks(tmp_path, lambda group: (group.threshold, group.refusal, group._one_shot))
    assert found == [(0, "rank 1 of 2: RuntimeError: no kernel image", None)] * 2


def test_a_rank_without_symmetric_memory_is_the_stated_reason(tmp_path: Path, pretended: pytest.MonkeyPatch) -> None:
    pretended.setattr(communicator, "open_one_shot", lambda *_: "symmetric memory: RuntimeError: no peer access")
    found = on_ranks(tmp_path, lambda group: (group.threshold, group.describe()))
    assert found == [(0, "nccl: symmetric memory: RuntimeError: no peer access")] * 2


def test_symmetric_memory_that_this_torch_lacks_is_a_reason_and_no_error(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has it")

    class Group:
        device = torch.device("cuda", 0)

    def opened(group: CudaCommunicator) -> object:
        nccl: Any = Group()
        return open_one_shot(group._prefixed("symmetric"), nccl, group.rank, 2, group.gather_objects, 5.0)

    first, second = on_ranks(tmp_path, opened)
    assert isinstance(first, str)
    assert first == second
    assert first.startswith("symmetric memory: ")


@pytest.mark.parametrize(
    ("x", "kernel"),
    [
        (torch.ones(250), "one_shot"),
        (torch.ones(251), "nccl"),
        (torch.ones(500, dtype=torch.bfloat16), "one_shot"),
        (torch.ones(10, dtype=torch.int64), "nccl"),
    ],
)
def test_small_sums_of_floats_are_ours(
    tmp_path: Path, pretended: pytest.MonkeyPatch, x: torch.Tensor, kernel: str
) -> None:
    pretended.setattr(communicator, "measured_threshold", lambda *_: 1000)
    chosen = on_ranks(tmp_path, lambda group: group.by_one_shot(x))
    assert chosen == [kernel == "one_shot"] * 2


# -- giving up ---------------------------------------------------------------------------------------------------------


class _Queue(_Mark):
    """Marks of a device that can be stopped."""

    stopped = False

    def query(self) -> bool:
        return not type(self).stopped


def test_collectives_that_never_end_are_given_up_within_the_timeout() -> None:
    class Stuck(_Queue):
        stopped = True

    given_up: list[float] = []
    begun = time.monotonic()
    watch = Watch("rank 1 of 2", 0.4, Stuck, lambda: given_up.append(time.monotonic() - begun))
    watch.check()
    watch.issued("nccl_all_reduce")
    while not given_up and time.monotonic() - begun < 10:
        time.sleep(0.01)
    assert 0.4 <= given_up[0] < 5
    assert watch.broken
    for _ in range(2):
        with pytest.raises(CommunicationError, match=r"nccl_all_reduce on rank 1 of 2 was given up after 0\.4 s"):
            watch.check()
    watch.close()
    assert len(given_up) == 1


def test_collectives_that_end_are_left_alone_however_many_follow() -> None:
    watch = Watch("rank 0 of 2", 0.2, _Mark, lambda: pytest.fail("given up"))
    for _ in range(60):
        watch.issued("one_shot_all_reduce")
        time.sleep(0.01)
    watch.check()
    watch.close()
    watch.close()
    assert not watch.broken


def test_new_collectives_do_not_hide_one_that_hangs() -> None:
    class Stuck(_Queue):
        stopped = True

    watch = Watch("rank 0 of 2", 0.3, Stuck, lambda: None)
    begun = time.monotonic()
    while not watch.broken and time.monotonic() - begun < 10:
        watch.issued("nccl_all_gather")
        time.sleep(0.01)
    assert time.monotonic() - begun < 5
    watch.close()


def test_a_failed_device_breaks_the_group() -> None:
    class Failed(_Mark):
        def query(self) -> bool:
            raise RuntimeError("illegal memory access")

    watch = Watch("rank 0 of 2", 0.2, Failed, lambda: None)
    watch.issued("nccl_broadcast")
    begun = time.monotonic()
    while not watch.broken and time.monotonic() - begun < 10:
        time.sleep(0.01)
    with pytest.raises(CommunicationError, match="nccl_broadcast on rank 0 of 2 failed: illegal memory access"):
        watch.check()
    watch.close()


def test_what_is_abandoned_is_given_up_once_and_at_once_whoever_does_it() -> None:
    class Stuck(_Queue):
        stopped = True

    given_up: list[str] = []
    watch = Watch("rank 1 of 2", 60.0, Stuck, lambda: given_up.append(threading.current_thread().name))
    watch.issued("nccl_all_reduce")
    watch.abandon("this rank cannot go on")
    watch.abandon("again")
    assert given_up == [threading.current_thread().name]
    with pytest.raises(CommunicationError, match="rank 1 of 2 were given up: this rank cannot go on"):
        watch.check()
    watch.close()


def test_a_group_that_another_rank_has_abandoned_is_given_up_long_before_the_timeout() -> None:
    news = [""]
    given_up: list[str] = []
    watch = Watch("rank 0 of 2", 60.0, _Mark, lambda: given_up.append("now"), lambda: news[0])
    time.sleep(0.6)
    watch.check()
    begun = time.monotonic()
    news[0] = "rank 1 cannot go on"
    while not given_up and time.monotonic() - begun < 10:
        time.sleep(0.01)
    assert time.monotonic() - begun < 5
    with pytest.raises(CommunicationError, match="were given up: rank 1 cannot go on"):
        watch.check()
    watch.close()
    assert given_up == ["now"]


def test_ranks_learn_through_their_store_who_has_abandoned_the_group(tmp_path: Path) -> None:
    def tell(group: CudaCommunicator) -> list[str]:
        before = group._told()
        group.barrier()
        if group.rank == 1:
            group._prefixed("abandoned").set("by", "1")
        group.barrier()
        return [before, group._told()]

    assert on_ranks(tmp_path, tell) == [["", "rank 1 cannot go on"]] * 2


def test_a_rank_that_abandons_a_group_through_host_memory_lets_the_other_go_and_both_meet_again(tmp_path: Path) -> None:
    found: dict[int, list[object]] = {}

    def run(rank: int) -> None:
        backend = CudaBackend()

        def meet(name: str) -> Any:
            store = f"file://{tmp_path}/{name}"
            return backend.connect(RankAddress(rank=rank, world_size=2, init_method=store, timeout=30.0))

        group = meet("first")
        begun = time.monotonic()
        if rank == 0:
            with pytest.raises(CommunicationError, match="all_reduce on rank 0 of 2 failed"):
                group.all_reduce(torch.ones(2))
        group.abandon()
        group.abandon()
        waited = time.monotonic() - begun
        again = meet("second")
        found[rank] = [group.abandoned, group.closed, waited < 15, again.all_reduce(torch.ones(2)).tolist()]
        again.close()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {rank: [True, True, True, [2.0, 2.0]] for rank in range(2)}


# -- exchanging addresses ----------------------------------------------------------------------------------------------


def test_exchanges_are_numbered_by_their_store_and_not_by_the_process() -> None:
    inner = dist.HashStore()  # type: ignore[attr-defined, unused-ignore]
    early, late = (NumberedStore(inner, timedelta(seconds=0.2)) for _ in range(2))
    early.set("Exchange/0/0", "a")
    early.set("Exchange/1/0", "b")
    late.set("Exchange/7/1", b"c")
    assert (late.get("Exchange/7/0"), early.get("Exchange/0/1"), late.get("Exchange/9/0")) == (b"a", b"c", b"b")
    late.set("other", "d")
    assert early.get("other") == b"d"
    assert early.check(["Exchange/0/0"])
    with pytest.raises(RuntimeError):
        early.get("Exchange/2/1")
