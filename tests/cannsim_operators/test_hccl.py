"""Domains over gloo, between threads of one process: the sums, the names, the refusals, the failures."""

from __future__ import annotations

import ctypes
import struct
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyaccel_cannsim.hccl import collectives, management
from polyaccel_cannsim.hccl.codes import HcclRefused, Result
from polyaccel_cannsim.hccl.domain import Domain
from polyaccel_cannsim.hccl.domains import domains_of
from polyaccel_cannsim.soc import find_soc

NUMBERS = {torch.int8: 0, torch.int32: 2, torch.float16: 3, torch.float32: 4, torch.int64: 5, torch.bfloat16: 11}


@pytest.fixture(autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    found = tmp_path_factory.mktemp("hccl")
    monkeypatch.setenv("CANNSIM_HCCL_FOLDER", str(found))
    monkeypatch.setenv("HCCL_CONNECT_TIMEOUT", "20")
    monkeypatch.setenv("HCCL_EXEC_TIMEOUT", "20")
    return found


def on_domain(size: int, work: Callable[[Domain], Any], **options: Any) -> list[Any]:
    """Run `work` on each rank of a new domain, in threads."""
    key = uuid.uuid4().hex

    def one(rank: int) -> Any:
        return work(Domain.join("d", key, rank, size, **options))

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))


def machine(chip: str = "910B") -> Any:
    return SimpleNamespace(settings=SimpleNamespace(soc=find_soc(chip)), communicators={})


def test_every_collective_moves_and_adds_what_it_should() -> None:
    def work(domain: Domain) -> None:
        r, n = domain.rank, domain.size
        simulator = machine()
        handle = domains_of(simulator).add(domain)

        def call(rule: Any, *arguments: Any) -> None:
            rule.function(*arguments, handle, None, simulator=simulator)()

        for dtype, number in NUMBERS.items():
            x = torch.arange(6, dtype=dtype) + r
            out = torch.empty_like(x)
            call(collectives.all_reduce, x.data_ptr(), out.data_ptr(), 6, number, 0)
            assert torch.equal(out, torch.arange(6, dtype=dtype) * n + n * (n - 1) // 2)
            call(collectives.all_reduce, x.data_ptr(), out.data_ptr(), 6, number, 2)
            assert torch.equal(out, torch.arange(6, dtype=dtype) + n - 1)
            out = torch.empty(3, dtype=dtype)
            whole = torch.arange(3 * n, dtype=dtype) + r
            call(collectives.reduce_scatter, whole.data_ptr(), out.data_ptr(), 3, number, 0)
            assert torch.equal(out, torch.arange(3 * r, 3 * r + 3, dtype=dtype) * n + n * (n - 1) // 2)
            gathered = torch.empty(6 * n, dtype=dtype)
            call(collectives.all_gather, x.data_ptr(), gathered.data_ptr(), 6, number)
            assert torch.equal(gathered.view(n, 6)[:, 0], torch.arange(n).to(dtype))
            y = x.clone()
            call(collectives.broadcast, y.data_ptr(), 6, number, n - 1)
            assert torch.equal(y, torch.arange(6, dtype=dtype) + n - 1)
            sent, taken = torch.arange(2 * n, dtype=dtype) + 10 * r, torch.empty(2 * n, dtype=dtype)
            call(collectives.all_to_all, sent.data_ptr(), 2, number, taken.data_ptr(), 2, number)
            assert taken.view(n, 2)[:, 0].tolist() == [10 * peer + 2 * r for peer in range(n)]
        x, out = torch.full((4,), float(r)), torch.full((4,), -1.0)
        call(collectives.reduce, x.data_ptr(), out.data_ptr(), 4, 4, 0, 1)
        assert out[0].item() == (n * (n - 1) / 2 if r == 1 else -1)
        whole = torch.arange(2.0 * n)
        call(collectives.scatter, whole.data_ptr(), out.data_ptr(), 2, 4, 0)
        assert out[:2].tolist() == [2 * r, 2 * r + 1]
        if r == 0:
            call(collectives.send, whole.data_ptr(), 3, 4, 1)
        if r == 1:
            call(collectives.receive, out.data_ptr(), 3, 4, 0)
            assert out[:3].tolist() == [0, 1, 2]
        here, there = (r + 1) % n, (r - 1) % n
        item = struct.Struct("i4xQQiI")
        items = ctypes.create_string_buffer(
            item.pack(1, out.data_ptr(), 2, 4, there) + item.pack(0, x.data_ptr(), 2, 4, here)
        )
        call(collectives.batch_send_receive, ctypes.addressof(items), 2)
        assert out[:2].tolist() == [there, there]
        call(collectives.barrier)

    on_domain(3, work)


@given(st.data())
@settings(max_examples=5)
def test_all_to_all_v_puts_every_piece_at_its_offset(data: st.DataObject) -> None:
    size = 2
    counts = [[data.draw(st.integers(0, 4)) for _ in range(size)] for _ in range(size)]
    gap = data.draw(st.integers(0, 2))

    def work(domain: Domain) -> None:
        r, simulator = domain.rank, machine()
        handle = domains_of(simulator).add(domain)

        def offsets(sizes: list[int]) -> list[int]:
            return [sum(sizes[:i]) + gap * i for i in range(size)]

        def pack(values: list[int]) -> Any:
            return (ctypes.c_uint64 * size)(*values)

        outgoing, incoming = counts[r], [counts[peer][r] for peer in range(size)]
        source = torch.arange(20.0) + 100 * r
        target = torch.full((20,), -1.0)
        arrays = [pack(outgoing), pack(offsets(outgoing)), pack(incoming), pack(offsets(incoming))]
        where = [ctypes.addressof(array) for array in arrays]
        arguments = (source.data_ptr(), where[0], where[1], 4, target.data_ptr(), where[2], where[3], 4, handle, None)
        collectives.all_to_all_v.function(*arguments, simulator=simulator)()
        wanted = torch.full((20,), -1.0)
        for peer in range(size):
            at, start, n = offsets(incoming)[peer], offsets(counts[peer])[r], incoming[peer]
            wanted[at : at + n] = torch.arange(20.0)[start : start + n] + 100 * peer
        assert torch.equal(target, wanted)

    on_domain(size, work)


def test_halves_are_added_in_float32_and_rounded_once() -> None:
    def work(domain: Domain) -> list[float]:
        x = torch.ones(30).half()
        x[domain.rank :: domain.size] = 2048  # 2048 + 1 rounds to 2048 in float16, whatever is added first
        found: list[float] = domain.reduce(x).tolist()
        return found

    assert on_domain(3, work) == [[2050.0] * 30] * 3


def test_a_sub_domain_is_made_of_chosen_ranks() -> None:
    def work(domain: Domain) -> Any:
        simulator = machine()
        parent = ctypes.c_void_p(domains_of(simulator).add(domain))
        if domain.rank == 1:
            return None
        ranks, place = (ctypes.c_uint32 * 2)(0, 2), ctypes.c_void_p()
        number = [0, None, 1][domain.rank]
        arguments = (ctypes.addressof(parent), 2, ctypes.addressof(ranks), 7, number, None, ctypes.addressof(place))
        assert management.create_sub_comm_config.function(*arguments, simulator=simulator) == 0
        child = domains_of(simulator).get("test", place.value)
        return child.rank, child.size, float(child.reduce(torch.tensor([domain.rank + 1.0])).item())

    assert on_domain(3, work) == [(0, 2, 4.0), None, (1, 2, 4.0)]


def test_names_sizes_and_ranks_are_answered_until_the_communicator_is_destroyed() -> None:
    simulator, root = machine(), ctypes.create_string_buffer(4108)
    assert management.get_root_info.function(ctypes.addressof(root)) == 0
    config = bytearray(2400)
    config[32:39] = b"my_name"
    config[316:320] = (77).to_bytes(4, "little")
    buffer, place = ctypes.create_string_buffer(bytes(config)), ctypes.c_void_p()
    management.comm_init_root_info_config.function(
        *(1, ctypes.addressof(root), 0, ctypes.addressof(buffer), ctypes.addressof(place)), simulator=simulator
    )
    name, size, rank, failure = (
        ctypes.create_string_buffer(128),
        ctypes.c_uint32(),
        ctypes.c_uint32(9),
        ctypes.c_int32(9),
    )
    for rule, target in (
        (management.get_comm_name, name),
        (management.get_rank_size, size),
        (management.get_rank_id, rank),
        (management.get_comm_async_error, failure),
    ):
        assert rule.function(place.value, ctypes.addressof(target), simulator=simulator) == 0
    assert (name.value, size.value, rank.value, failure.value) == (b"my_name", 1, 0, 0)
    found = domains_of(simulator).find("my_name")
    assert found is not None
    assert found.execute_timeout == 77
    management.comm_destroy.function(place.value, simulator=simulator)
    assert domains_of(simulator).find("my_name") is None
    with pytest.raises(HcclRefused, match="does not exist") as caught:
        management.get_rank_size.function(place.value, ctypes.addressof(size), simulator=simulator)
    assert caught.value.code == Result.NOT_FOUND


def test_ranks_that_never_come_are_reported_as_a_socket_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HCCL_CONNECT_TIMEOUT", "0.3")
    with pytest.raises(HcclRefused, match="wait socket establish timeout") as caught:
        Domain.join("late", uuid.uuid4().hex, 0, 2)
    assert (caught.value.code, caught.value.prefix) == (Result.TIMEOUT, "EI0006")


def test_a_rank_that_stays_away_fails_the_collective_and_marks_the_domain() -> None:
    def work(domain: Domain) -> Any:
        if domain.rank:
            return domain  # kept alive, but it never calls
        with pytest.raises(HcclRefused, match="did not finish") as caught:
            domain.reduce(torch.ones(3))
        return domain.asynchronous, caught.value.prefix

    assert on_domain(2, work, execute_timeout=0.5)[0] == (Result.TIMEOUT, "EI0002")


@pytest.mark.parametrize(
    ("chip", "dtype", "operation", "code"),
    [
        ("910B", 10, 0, Result.NOT_SUPPORTED),  # float64
        ("910B", 11, 1, Result.NOT_SUPPORTED),  # prod of bfp16
        ("910B", 6, 0, Result.PARAMETER),  # uint64
        ("910B", 4, 9, Result.PARAMETER),
        ("310P", 11, 0, Result.NOT_SUPPORTED),
        ("310P", 5, 0, Result.NOT_SUPPORTED),
    ],
)
def test_the_simulator_refuses_reductions_that_the_page_forbids(
    chip: str, dtype: int, operation: int, code: Result
) -> None:
    simulator, x = machine(chip), torch.ones(2)
    handle = domains_of(simulator).add(Domain.join("one", "k", 0, 1))
    with pytest.raises(HcclRefused) as caught:
        collectives.all_reduce.function(
            *(x.data_ptr(), x.data_ptr(), 1, dtype, operation, handle, None), simulator=simulator
        )
    assert caught.value.code == code


def test_null_buffers_wrong_roots_and_wrong_peers_are_refused() -> None:
    simulator, x = machine(), torch.ones(2)
    handle = domains_of(simulator).add(Domain.join("one", "k", 0, 1))
    for rule, arguments, code in (
        (collectives.all_reduce, (None, x.data_ptr(), 2, 4, 0, handle, None), Result.POINTER),
        (collectives.all_reduce, (x.data_ptr(), x.data_ptr(), 2, 4, 0, None, None), Result.POINTER),
        (collectives.broadcast, (x.data_ptr(), 2, 4, 1, handle, None), Result.PARAMETER),
        (collectives.send, (x.data_ptr(), 2, 4, 0, handle, None), Result.PARAMETER),
    ):
        with pytest.raises(HcclRefused) as caught:
            rule.function(*arguments, simulator=simulator)
        assert caught.value.code == code
