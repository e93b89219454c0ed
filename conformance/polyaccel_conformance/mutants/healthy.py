"""The hosts in the wrappers of mutants, unharmed."""

from __future__ import annotations

from collections.abc import Mapping
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
from polyaccel_conformance.mutants.mutant import Altered, Function, Mutant
from polyaccel_conformance.mutants.ranks import Around
from polyaccel_conformance.mutants.storage import changed
from polyaccel_conformance.simulated import SimulatedBackend
from polyaccel_conformance.simulated.step import SimulatedStep

DENSE = (
    *("linear", "rms_norm", "layer_norm", "rotary_embedding", "silu_and_mul", "gelu", "select_rows", "embedding"),
    *(
        "write_kv_cache",
        "paged_attention",
        "dense_attention",
        "moe_route",
        "moe_experts",
        "sample",
        "sgmv",
        "dequantize",
    ),
    *("device.copy_paths", "storage.weight", "storage.adapters", "storage.kv", "storage.sampling", "sample.generator"),
)
OF_RANKS = ("all_reduce", "broadcast", "barrier", "row_parallel_linear", "moe_experts", "sgmv")


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


HOSTS: tuple[Mutant, ...] = (
    Mutant(name="healthy.operators", what="Nothing.", operators=DENSE, check="values.exact", apply=_Operators),
    Mutant(name="healthy.ranks", what="Nothing.", operators=OF_RANKS, check="comm.trace", apply=_Operators, devices=4),
    Mutant(
        name="healthy.engine",
        what="Nothing.",
        operators=WHOLE_MODEL,
        check="model.tokens",
        apply=lambda inner: inner,
        engine=True,
    ),
    Mutant(
        name="healthy.devices",
        what="Nothing.",
        operators=(*SOME, "sgmv", "gelu"),
        check="graph.replay",
        apply=lambda inner: _Graphs(),
        host="simulated",
    ),
)
