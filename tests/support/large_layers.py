"""Layers of real sizes on a backend, each fed the reference's input: the suite's own check on larger families.

The suite's models are small, so that anybody can run it. Here the same problem is set with the shapes of a 7B and of a
rank's quarter of a 70B, three layers of each (the first, one between and the last), and adapters of six ranks. The
reference is the suite's: float64 and its bound. Weights are torch's random numbers, which are faster to draw than the
suite's own and need not be the same everywhere.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from polyaccel.backend import Communicator
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Case
from polyaccel_conformance.check import Failure
from polyaccel_conformance.compare import headroom
from polyaccel_conformance.models.families import LINEARS, Family, Floats32, SmallAdapter
from polyaccel_conformance.models.layers import NAME, LayersCheck, LayersProblem
from polyaccel_conformance.models.reference import Reference
from polyaccel_conformance.multi.bench import RankBench
from polyaccel_conformance.oracle.bounded import Expected
from polyaccel_conformance.trial import Trial

MODULES = "polyaccel_conformance.models"
RANKS = (1, 8, 16, 32, 64, 128)
LAYERS = 3


def llama(name: str, hidden: int, intermediate: int, heads: int, kv_heads: int, head_dim: int) -> Family:
    return Family(
        name=name,
        architecture="LlamaForCausalLM",
        model_type="llama",
        hidden=hidden,
        intermediate=intermediate,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocabulary=64,
        layers=LAYERS,
    )


SHAPES: Mapping[str, Family] = {
    family.name: family
    for family in (
        llama("7B", 4096, 14336, 32, 8, 128),
        llama("70B/4", 8192, 7168, 16, 2, 128),
        llama("little", 48, 80, 6, 2, 8),
    )
}
"""Mistral-7B; one rank's share of Llama-2-70B cut four ways; what tests of this module take."""
ADAPTERS: Mapping[str, SmallAdapter] = {
    f"r{rank}": SmallAdapter(name=f"r{rank}", rank=rank, alpha=2 * rank, modules=LINEARS) for rank in RANKS
}
MIXES: Mapping[str, tuple[Mapping[int, float], ...]] = {
    "none": ({},),
    "all": ({0: 1.0}, {1: 1.0, 5: 0.5}, {2: 1.0, 3: -0.5}, {4: 1.0}),
}
"""By slot, of one request after the other: every rank, and two at once."""


@functools.lru_cache(maxsize=1)
def tensors(family: Family, seed: int = 0) -> dict[str, Floats32]:
    """Like :func:`polyaccel_conformance.models.families.tensors`."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Floats32] = {}
    for name, shape in family.shapes().items():
        drawn = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            drawn = 1 + 0.1 * drawn
        elif name != "model.embed_tokens.weight":
            drawn *= (2.0 if name == "lm_head.weight" else 1.0) / shape[-1] ** 0.5
        found[name] = drawn.numpy()
    return found


@functools.lru_cache(maxsize=1)
def reference(name: str, dtype: str) -> Reference:
    return Reference(SHAPES[name], dict(enumerate(ADAPTERS.values())), dtype)


class LargeProblem(LayersProblem):
    """A step through layers of these shapes."""

    @property
    def reference(self) -> Reference:  # type: ignore[override]
        return reference(self.family.name, self.case.dtype)


@contextmanager
def enlarged() -> Iterator[None]:
    """The suite with these families, adapters and mixes in the place of its own."""
    changes = {
        "FAMILIES": (SHAPES, ("layers", "engines", "rank_model")),
        "ADAPTERS": (ADAPTERS, ("layers", "engines")),
        "MIXES": (MIXES, ("layers",)),
        "tensors": (tensors, ("families", "reference")),
    }
    with ExitStack() as stack:
        for name, (value, modules) in changes.items():
            for module in modules:
                stack.enter_context(mock.patch(f"{MODULES}.{module}.{name}", value))
        yield


@dataclass(frozen=True, slots=True)
class Collected:
    """A control plane over the communicator under test."""

    comm: Communicator

    @property
    def rank(self) -> int:
        return self.comm.rank

    @property
    def world_size(self) -> int:
        return self.comm.world_size

    def gather(self, topic: str, value: object = None) -> list[object]:
        return self.comm.gather_objects(value)


def rank_bench(bench: Bench, comm: Communicator, folder: Path) -> RankBench:
    """A bench of one rank of several."""
    return RankBench(
        bench.backend, bench.device, comm, control=Collected(comm), folder=folder, timeout=60.0, withheld=60.0
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """``failure``: the first station that is wrong; ``worst``: err / tol by station, the largest of all layers."""

    failure: Failure | None
    worst: Mapping[str, float]


def prove(
    bench: Bench, shape: str, phase: str, adapters: str, dtype: str = "bfloat16", *, wrong: bool = False
) -> Found:
    """Run every layer of a shape and judge each station, inside of :func:`enlarged`; ``wrong``: with a layer that is,
    which must be found."""
    rank, world = bench.comm.rank, bench.comm.world_size
    axes = {"dtype": dtype, "attributes.family": shape, "structure.phase": phase, "structure.adapters": adapters}
    problem = LargeProblem(Case.of(NAME, {**axes, "ranks": world}, seed=7), rank)
    problem.sabotaged = wrong
    trial = Trial(bench, problem)
    try:
        failure = LayersCheck().run(trial)
        outputs = trial.ask().outputs
    finally:
        trial.close()
    worst: dict[str, float] = {}
    for name, expected in problem.expected().items():
        if isinstance(expected, Expected):
            station = name.rpartition(".")[2]
            values = outputs[name].values.reshape(expected.value.shape).astype(np.float64)
            worst[station] = max(worst.get(station, 0.0), headroom(expected, values))
    return Found(failure=failure, worst=worst)


def forget() -> None:
    """Give back the memory of the last shape."""
    tensors.cache_clear()
    reference.cache_clear()
