"""What a run must say about where it took place, so that a certificate can be told stale and a machine told apart."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import metadata

import hypothesis
import numpy
import torch

import polyaccel
from polyaccel.backend import API_VERSION, Backend
from polyaccel.backend.registry import installed
from polyaccel.backend.version import format_version
from polyaccel_conformance.certificate.sources import backend_digest, contract_digest, core_digest, suite_digest
from polyaccel_conformance.levels.evidence import Machine
from polyaccel_conformance.multi.identity import RankIdentity, device_properties

YES = "yes"
UNKNOWN = "unknown"
SOURCES = ("source.backend", "source.contract", "source.core", "source.suite")
"""Keys of the hashes that decide whether a certificate is stale."""


def environment(name: str, backend: Backend) -> dict[str, str]:
    """Strings by key, of the backend registered (or tabled) as ``name``."""
    devices = list(backend.devices())
    found = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "hypothesis": hypothesis.__version__,
        "polyaccel": polyaccel.__version__,
        "contract": format_version(API_VERSION),
        "devices": ", ".join(f"{device.name} ({device.torch_device})" for device in devices),
        "devices.count": str(len(devices)),
        "simulated": YES if backend.simulated else "no",
        "graphs": "; ".join(backend.graph_refusals()),
        "driver": driver(devices[0].torch_device) if devices else "",
        **sources(backend),
    }
    for entry in installed():
        if entry.name == name:
            found["distribution"] = f"{entry.distribution} {entry.version}"
            found["entry point"] = entry.target
    return found


def sources(backend: Backend) -> dict[str, str]:
    """The hashes that decide whether a certificate is stale. Asks for no device: where there is none, a certificate can
    be verified all the same."""
    found = backend_digest(backend), contract_digest(), core_digest(), suite_digest()
    return dict(zip(SOURCES, found, strict=True))


def driver(device: torch.device) -> str:
    """Versions below torch, as far as its module for the device tells them; ``unknown`` for a device that its driver
    does not describe, such as one that nothing has used yet."""
    known = [f"{name} {version}" for name in ("cuda", "hip", "xpu") if (version := getattr(torch.version, name, None))]
    if device.type in ("cpu", "meta"):
        return ""
    try:
        properties = device_properties(device)
        if properties is not None:
            known.append(str(properties))
    except RuntimeError:
        known.append(f"{device.type} {UNKNOWN}")
    with suppress(metadata.PackageNotFoundError):
        known.append(f"torch_{device.type} {metadata.version(f'torch_{device.type}')}")
    return ", ".join(known)


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()


def machine(environment: Mapping[str, str], ranks: int, identities: Sequence[RankIdentity] = ()) -> Machine:
    """What the levels need to know, read back from a run's environment."""
    count = environment.get("devices.count", "1")
    return Machine(
        devices=int(count) if count.isdigit() else 1,
        ranks=ranks,
        graphs=environment.get("graphs", ""),
        simulated=environment.get("simulated", "") == YES,
        identities=tuple(identities),
    )
