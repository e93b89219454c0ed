"""What the ranks of a run were, in words: for the level's title, so that one device is never taken for several."""

from __future__ import annotations

from collections.abc import Sequence

from polyaccel_conformance.multi.identity import RankIdentity


def described(identity: RankIdentity) -> str:
    """``rank 1 of 2: pid 7 on here, vendor:1 (cuda GPU-5, number 1), nccl, polyaccel 0.1, torch 2.13.0``."""
    simulated = ", simulated" if identity.simulated else ""
    device = f"{identity.device} ({identity.device_id}, number {identity.device_index}{simulated})"
    return (
        f"rank {identity.rank} of {identity.world_size}: pid {identity.pid} on {identity.host}, {device}, "
        f"{identity.transport}, {identity.version}, torch {identity.torch_version}"
    )


def world(identities: Sequence[RankIdentity], size: int) -> tuple[RankIdentity, ...]:
    """The ranks of the world of this size."""
    return tuple(identity for identity in identities if identity.world_size == size)


def qualification(identities: Sequence[RankIdentity]) -> str:
    """What a level has to say beside its name; empty for one real device a rank."""
    ranks, devices = len(identities), list(dict.fromkeys((i.host, i.device_id) for i in identities))
    count = len(devices)
    simulated = {(i.host, i.device_id) for i in identities if i.simulated}
    kind = "simulated " if len(simulated) == count else ""
    noun = f"{count} {kind}device{'s' if count != 1 else ''}"
    if count < ranks:
        some = f", {len(simulated)} of them simulated" if simulated and not kind else ""
        return f"{ranks} ranks sharing {noun}{some}: {', '.join(dict.fromkeys(i.device for i in identities))}"
    if not simulated:
        return ""
    return noun if kind else f"{noun}, {len(simulated)} of them simulated"


def objections(identities: Sequence[RankIdentity], largest: int) -> tuple[str, ...]:
    """Why ranks of the worlds 2 to ``largest`` can earn no level on several devices; empty if they can."""
    found: list[str] = []
    for size in range(2, largest + 1):
        ranks = world(identities, size)
        if [i.rank for i in ranks] != list(range(size)):
            found.append(f"world {size}: its ranks did not all say who they were")
        elif len({(i.host, i.pid) for i in ranks}) < size:
            found.append(f"world {size}: ranks are not processes of their own")
        elif len({(i.backend, i.version, i.torch_version) for i in ranks}) > 1:
            found.append(f"world {size}: ranks run different backends or versions")
    return tuple(found)
