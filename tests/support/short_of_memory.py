"""The CPU backend on ranks whose memory runs out where a test says: a plugin, so that worker processes find it too."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch

from polyaccel.backend import (
    AdapterStore,
    Communicator,
    Device,
    DeviceState,
    Entry,
    KVCache,
    KVSpec,
    MemoryInfo,
    RankAddress,
    SamplingSpec,
    SamplingState,
    Step,
    StepInput,
    TorchDevice,
    Weight,
    WeightSpec,
)
from polyaccel.backend.cpu.backend import CpuBackend

NAME = "short-of-memory"
VARIABLE = "POLYACCEL_TEST_SHORTAGE"
MESSAGE = "tried to allocate 12345 bytes"


@dataclass(frozen=True, kw_only=True)
class Shortage:
    """Where memory runs out.

    Attributes:
        ranks: on which; the others have enough.
        stage: "weights", "kv", "adapters", "sampling", "connect" (again, after the first time), "step"; joined by "+".
        at: in a step, how many operators have run before, or the name of the one that finds no room.
        tokens, context: steps of at least as many tokens, or with a context as long, have no room.
        times: how often; then there is room again.
        free: what the device says is free; None: what the host has.
    """

    ranks: tuple[int, ...] = ()
    stage: str = ""
    at: int | str = 0
    tokens: int = 1
    context: int = 0
    times: int = 1 << 30
    free: int | None = None

    @classmethod
    def told(cls) -> Shortage:
        values = json.loads(os.environ.get(VARIABLE, "{}"))
        return cls(**(values | {"ranks": tuple(values.get("ranks", ()))}))


def install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Shortage], str]:
    """Make the plugin known to this process and to workers; the result says where memory runs out, and its name."""
    info = folder / "short_of_memory-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {NAME}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        f"[polyaccel.backends]\n{NAME} = {__name__}:ShortOfMemory\n[polyaccel.backend_api]\n{NAME} = v1_0:v1_0\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    importlib.invalidate_caches()

    def told(shortage: Shortage) -> str:
        monkeypatch.setenv(VARIABLE, json.dumps(asdict(shortage)))
        return NAME

    return told


class ShortDevice(TorchDevice):
    """The CPU with as much free memory as a test says."""

    def __init__(self, free: Callable[[], int | None]) -> None:
        super().__init__("cpu")
        self._free = free

    def memory(self) -> MemoryInfo:
        free = self._free()
        return super().memory() if free is None else MemoryInfo(free=free, total=1 << 40)


class ShortOfMemory(CpuBackend):
    """The CPU backend, where memory runs out as in :class:`Shortage`."""

    name = NAME

    def __init__(self) -> None:
        super().__init__()
        self._short = Shortage.told()
        self._left = self._short.times
        self._lacks = False
        self._calls = 0
        self._joined = 0
        self._device = ShortDevice(lambda: self._short.free if self._here() else None)

    def _here(self) -> bool:
        return (self.launcher.rank or 0) in self._short.ranks

    def _need(self, stage: str) -> None:
        if self._here() and stage in self._short.stage.split("+") and self._left > 0:
            self._left -= 1
            raise torch.OutOfMemoryError(MESSAGE)

    def operators(self) -> Mapping[str, Entry]:
        def counted(name: str, fn: Callable[..., object], *args: object, **kwargs: object) -> object:
            if self._lacks and self._short.at in (name, self._calls):
                self._need("step")
            self._calls += 1
            return fn(*args, **kwargs)

        entries = {name: entry for name, entry in super().operators().items() if isinstance(entry, Entry)}
        return {name: replace(entry, fn=partial(counted, name, entry.fn)) for name, entry in entries.items()}

    def begin_step(self, inputs: StepInput, state: DeviceState, device: Device) -> Step:
        short = self._short
        self._lacks = inputs.tokens >= short.tokens and int(inputs.context_lengths.max()) >= short.context
        self._calls = 0
        return super().begin_step(inputs, state, device)

    def allocate_weight(self, spec: WeightSpec, device: Device, tied: Weight | None = None) -> Weight:
        self._need("weights")
        return super().allocate_weight(spec, device, tied)

    def allocate_kv(self, spec: KVSpec, device: Device) -> KVCache:
        self._need("kv")
        return super().allocate_kv(spec, device)

    def allocate_adapters(
        self, weights: Mapping[str, Weight], *, rank_rows: int, slots: int, device: Device
    ) -> AdapterStore:
        self._need("adapters")
        return super().allocate_adapters(weights, rank_rows=rank_rows, slots=slots, device=device)

    def allocate_sampling(self, spec: SamplingSpec, device: Device) -> SamplingState:
        self._need("sampling")
        return super().allocate_sampling(spec, device)

    def connect(self, address: RankAddress) -> Communicator:
        self._joined += 1
        if self._joined > 1:
            self._need("connect")
        return super().connect(address)

    def devices(self) -> Sequence[Device]:
        return (self._device,)
