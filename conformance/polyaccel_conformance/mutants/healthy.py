"""The hosts in the wrappers of mutants, unharmed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from polyaccel.backend import (
    AdapterStore,
    Backend,
    Communicator,
    Device,
    Graph,
    GraphKey,
    RankAddress,
    Step,
    StepFunction,
    Weight,
    WeightSpec,
)
from polyaccel_conformance.mutants.devices import SOME
from polyaccel_conformance.mutants.engine import WHOLE_MODEL
from polyaccel_conformance.mutants.graphs import Replaying
from polyaccel_conformance.mutants.mutant import Altered, Function, Mutant, changed
from polyaccel_conformance.mutants.ranks import Around
from polyaccel_conformance.simulated import SimulatedBackend
from polyaccel_conformance.simulated.step import SimulatedStep

PARTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "dense": ("linear", "rms_norm", "layer_norm", "silu_and_mul", "gelu"),
        "sequences": ("rotary_embedding", "select_rows", "embedding", "write_kv_cache", "dense_attention"),
        "attention": ("paged_attention",),
        "experts": ("moe_route", "moe_experts", "dequantize"),
        "adapters": ("sgmv",),
        "sampling": ("sample", "sample.generator"),
        "storage": ("device.copy_paths", "storage.weight", "storage.adapters", "storage.kv", "storage.sampling"),
    }
)
"""Operators and questions that are asked of the CPU backend in wrappers, a few at a time."""
RANKS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "collectives": ("all_reduce", "broadcast", "barrier"),
        "stations": ("row_parallel_linear",),
        "shares": ("moe_experts", "sgmv"),
    }
)


def _same(fn: Function) -> Function:
    def operator(*arguments: Any, **options: Any) -> Any:
        return fn(*arguments, **options)

    return operator


class _Operators(Altered):
    """Every operator in a wrapper, and storage of changed classes."""

    def __init__(self, inner: Backend) -> None:
        super().__init__(inner, dict.fromkeys(inner.table(), _same))

    def connect(self, address: RankAddress) -> Communicator:
        comm = super().connect(address)
        return Around(comm) if address.world_size > 1 else comm

    def allocate_weight(self, spec: WeightSpec, device: Device, tied: Weight | None = None) -> Weight:
        return changed(super().allocate_weight(spec, device, tied))  # type: ignore[no-any-return]

    def allocate_adapters(
        self, weights: Mapping[str, Weight], *, rank_rows: int, slots: int, device: Device
    ) -> AdapterStore:
        made = super().allocate_adapters(weights, rank_rows=rank_rows, slots=slots, device=device)
        return changed(made)  # type: ignore[no-any-return]


class _Step(SimulatedStep):
    """A step of another class."""


class _Graphs(SimulatedBackend):
    """Graphs in a wrapper, captured with a step of another class."""

    def capture(self, key: GraphKey, fn: StepFunction, step: Step) -> Graph:
        assert isinstance(step, SimulatedStep)
        return Replaying(self, key, fn, _Step(step.input, step.state, step.buffers))


def _host(name: str, operators: tuple[str, ...], apply: Callable[[Any], Backend], **fields: Any) -> Mutant:
    return Mutant(
        name=f"healthy.{name}", what="Nothing.", operators=operators, check="values.exact", apply=apply, **fields
    )


HOSTS: tuple[Mutant, ...] = (
    *(_host(name, operators, _Operators) for name, operators in PARTS.items()),
    *(_host(name, operators, _Operators, devices=2) for name, operators in RANKS.items()),
    _host("engine", WHOLE_MODEL, lambda inner: inner, engine=True),
    _host("devices", SOME, lambda inner: _Graphs(), host="simulated"),
    _host("graphs", ("linear",), lambda inner: _Graphs(), host="simulated"),
    _host("loads", ("sgmv",), lambda inner: _Graphs(), host="simulated"),
)
