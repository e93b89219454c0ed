"""What the ranks of a run were, in words: for the level's title, so that one device is never taken for several."""

from __future__ import annotations

from collections.abc import Sequence

from polyaccel_conformance.multi.control import RankIdentity


def described(identities: Sequence[RankIdentity]) -> str:
    """``"2 ranks on cpu (shared), transport gloo, torch 2.13.0"``."""
    names = list(dict.fromkeys(i.device + (" (simulated)" if i.simulated else "") for i in identities))
    transports = ", ".join(dict.fromkeys(i.transport for i in identities))
    versions = ", ".join(dict.fromkeys(i.torch_version for i in identities))
    shared = " (shared)" if shared_devices(identities) else ""
    return f"{len(identities)} ranks on {', '.join(names)}{shared}, transport {transports}, torch {versions}"


def shared_devices(identities: Sequence[RankIdentity]) -> dict[str, tuple[int, ...]]:
    """Devices that several ranks use, with these ranks."""
    users: dict[tuple[str, str], list[int]] = {}
    for identity in identities:
        users.setdefault((identity.host, identity.device), []).append(identity.rank)
    return {device: tuple(ranks) for (_, device), ranks in users.items() if len(ranks) > 1}


def qualifications(identities: Sequence[RankIdentity]) -> tuple[str, ...]:
    """What a level on several devices has to say beside its name; empty for one real device a rank."""
    found = [
        f"device {device} is shared by ranks {', '.join(map(str, ranks))}"
        for device, ranks in shared_devices(identities).items()
    ]
    simulated = [i.rank for i in identities if i.simulated]
    if simulated:
        found.append(f"devices of ranks {', '.join(map(str, simulated))} are simulated")
    return tuple(found)


def objections(identities: Sequence[RankIdentity]) -> tuple[str, ...]:
    """Why these ranks can earn no level on several devices; empty if they can."""
    found = []
    if len(identities) < 2:
        found.append(f"a world of {len(identities)} shows nothing of several devices")
    if len({(i.host, i.pid) for i in identities}) < len(identities):
        found.append("ranks are not processes of their own")
    if [i.rank for i in identities] != list(range(len(identities))):
        found.append("the ranks are not 0, 1, 2, ...")
    if len({i.backend for i in identities}) > 1:
        found.append("ranks run different backends")
    return tuple(found)
