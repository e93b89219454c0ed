"""The questions about a device and its storage, by name: their cases, and the checks that judge them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from polyaccel_conformance.checks.cache_identity import CacheIdentity
from polyaccel_conformance.checks.copies import CopyPaths
from polyaccel_conformance.checks.generator import Generator
from polyaccel_conformance.checks.storage import WeightStorage
from polyaccel_conformance.checks.storage_adapters import AdapterStorage
from polyaccel_conformance.checks.storage_state import CacheStorage, SamplingStorage
from polyaccel_conformance.device_check import DeviceCheck, DeviceQuestion

DEVICE_SETS: Mapping[str, DeviceCheck] = MappingProxyType(
    {
        s.operator: s
        for s in (
            CopyPaths(),
            WeightStorage(),
            AdapterStorage(),
            CacheStorage(),
            SamplingStorage(),
            Generator(),
            CacheIdentity(),
        )
    }
)

DEVICE_QUESTIONS: Mapping[str, DeviceQuestion] = MappingProxyType(
    {name: DeviceQuestion(cases) for name, cases in DEVICE_SETS.items()}
)
