"""Who the ranks were decides what they can earn, and what a level is called."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from polyaccel.backend import Backend, SingleRank, TorchDevice, load
from polyaccel_conformance.multi.devices import described, objections, qualification, world
from polyaccel_conformance.multi.identity import RankIdentity, device_id
from polyaccel_conformance.simulated import SimulatedBackend


def ranks(size: int) -> list[RankIdentity]:
    """One real device a rank; all have the same marketing name."""
    return [
        RankIdentity(
            rank=rank,
            world_size=size,
            pid=100 + rank,
            host="here",
            backend="vendor",
            version="polyaccel-vendor 1.0",
            device="Vendor One",
            device_index=rank,
            device_id=f"vendor {rank}",
            transport="vccl 2.1",
            torch_version="2.13.0",
        )
        for rank in range(size)
    ]


def test_one_device_a_rank_needs_no_word() -> None:
    assert qualification(ranks(2)) == ""
    assert objections(ranks(2), 2) == ()


def test_a_rank_is_described_by_all_that_it_says() -> None:
    assert described(ranks(2)[1]) == (
        "rank 1 of 2: pid 101 on here, Vendor One (vendor 1, number 1), vccl 2.1, polyaccel-vendor 1.0, torch 2.13.0"
    )


def test_ranks_that_share_a_device_say_so() -> None:
    shared = [replace(each, device_id="vendor 0") for each in ranks(4)]
    assert qualification(shared) == "4 ranks sharing 1 device: Vendor One"


def test_equal_numbers_on_two_hosts_are_two_devices() -> None:
    first, second = ranks(2)
    assert qualification([first, replace(second, host="there", device_id=first.device_id)]) == ""


def test_simulated_devices_say_so() -> None:
    simulated = [replace(each, simulated=True) for each in ranks(2)]
    assert qualification(simulated) == "2 simulated devices"
    assert qualification([simulated[0], ranks(2)[1]]) == "2 devices, 1 of them simulated"
    assert "simulated" in described(simulated[0])
    both = [replace(each, device_id="vendor 0") for each in simulated]
    assert qualification(both) == "2 ranks sharing 1 simulated device: Vendor One"


def test_every_world_from_2_on_must_have_said_who_it_is() -> None:
    assert objections(ranks(3), 3) == ("world 2: its ranks did not all say who they were",)
    assert objections([*ranks(2), *ranks(3)], 3) == ()
    assert world([*ranks(2), *ranks(3)], 3) == tuple(ranks(3))


def test_ranks_of_one_process_are_objected_to() -> None:
    assert objections([replace(each, pid=1) for each in ranks(2)], 2) == (
        "world 2: ranks are not processes of their own",
    )


@pytest.mark.parametrize("field", ["backend", "version", "torch_version"])
def test_ranks_that_run_different_things_are_objected_to(field: str) -> None:
    first, second = ranks(2)
    assert objections([first, replace(second, **{field: "other"})], 2) == (
        "world 2: ranks run different backends or versions",
    )


@pytest.mark.parametrize(
    ("backend", "simulated"), [(load("cpu"), False), (SimulatedBackend(), True)], ids=["cpu", "simulated"]
)
def test_a_backend_says_whether_its_devices_are_simulated(backend: Backend, simulated: bool) -> None:
    told = [RankIdentity.of(backend, device, SingleRank()) for device in backend.devices()]
    assert {each.simulated for each in told} == {simulated}
    assert len({each.device_id for each in told}) == len(backend.devices())


@pytest.mark.parametrize("raises", [True, False])
def test_a_driver_that_cannot_describe_its_device_yet_leaves_torchs_name(raises: bool) -> None:
    class Module:
        @staticmethod
        def get_device_properties(device: torch.device) -> object:
            if raises:
                raise RuntimeError("107002: the context is empty")
            return SimpleNamespace(uuid="GPU-7")

    with mock.patch.object(torch, "get_device_module", return_value=Module):
        assert device_id(TorchDevice("cuda:1")) == ("cuda:1" if raises else "cuda GPU-7")
