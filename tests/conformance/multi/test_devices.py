"""Who the ranks were decides what they can earn."""

from __future__ import annotations

from dataclasses import replace

from polyaccel_conformance.multi.control import RankIdentity
from polyaccel_conformance.multi.devices import described, objections, qualifications, shared_devices


def ranks(world: int) -> list[RankIdentity]:
    """One real device a rank."""
    return [
        RankIdentity(
            rank=rank,
            pid=100 + rank,
            host="here",
            backend="vendor",
            device=f"vendor:{rank}",
            device_index=rank,
            transport="vccl",
            torch_version="2.13.0",
        )
        for rank in range(world)
    ]


def test_one_device_a_rank_needs_no_qualification() -> None:
    assert not objections(ranks(2))
    assert not qualifications(ranks(2))
    assert described(ranks(2)) == "2 ranks on vendor:0, vendor:1, transport vccl, torch 2.13.0"


def test_a_world_of_one_earns_nothing() -> None:
    assert objections(ranks(1)) == ("a world of 1 shows nothing of several devices",)


def test_ranks_of_one_process_earn_nothing() -> None:
    same = [replace(identity, pid=100) for identity in ranks(2)]
    assert objections(same) == ("ranks are not processes of their own",)


def test_a_shared_and_a_simulated_device_are_named() -> None:
    shared = [replace(identity, device="vendor:0", simulated=identity.rank == 1) for identity in ranks(3)]
    assert shared_devices(shared) == {"vendor:0": (0, 1, 2)}
    assert qualifications(shared) == (
        "device vendor:0 is shared by ranks 0, 1, 2",
        "devices of ranks 1 are simulated",
    )
    assert "vendor:0 (simulated)" in described(shared)


def test_missing_ranks_and_mixed_backends_are_objected_to() -> None:
    first, second = ranks(2)
    assert objections([second, first]) == ("the ranks are not 0, 1, 2, ...",)
    assert objections([first, replace(second, backend="other")]) == ("ranks run different backends",)
