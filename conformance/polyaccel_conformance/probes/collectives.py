"""Sums over ranks: what a rank sends is read off what every rank receives. All ranks measure together."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Choice
from polyaccel_conformance.formats import format_of
from polyaccel_conformance.harness.probes import ACCUMULATOR_BITS, Measured, leading
from polyaccel_conformance.probes.planted import plain, run, stored
from polyaccel_conformance.problems.collectives import AllReduceProblem, CollectiveProblem, ReduceScatterProblem

Floats = npt.NDArray[np.float64]


def all_reduce(bench: Bench, dtype: str, k: int) -> tuple[Measured, ...]:
    """Bits of a rank's numbers, and of partial sums over ranks."""
    return _measured(bench, dtype, AllReduceProblem, "all_reduce", 1)


def reduce_scatter(bench: Bench, dtype: str, k: int) -> tuple[Measured, ...]:
    """The same of every rank's own row."""
    return _measured(bench, dtype, ReduceScatterProblem, "reduce_scatter", bench.comm.world_size)


def _measured(
    bench: Bench, dtype: str, kind: type[CollectiveProblem], operator: str, rows: int
) -> tuple[Measured, ...]:
    world, rank = bench.comm.world_size, bench.comm.rank

    def summed(parts: Floats) -> Floats:
        """Of ``parts: [ranks, columns]``."""
        axes: dict[str, Choice] = {"dims.rows": 1, "dims.width": parts.shape[1], "ranks": world}
        problem = kind(plain(operator, dtype, {**axes, "structure.scenario": "plain"}), rank)
        problem.contributions = [stored(np.tile(part, (rows, 1)), dtype) for part in parts]
        problem.operands = {"x": problem.contributions[rank]}
        found: Floats = run(bench, problem, "y")[0]
        return found

    exponents = np.arange(1, format_of(dtype).bits)
    probes = np.repeat(1 + np.ldexp(1.0, -exponents), world)
    alone = np.where(np.arange(world)[:, None] == np.tile(np.arange(world), len(exponents)), probes, 0.0)
    seen = (summed(alone) == probes).reshape(len(exponents), world).all(axis=1)
    largest, parts, wanted = _cancelling(dtype, world)
    kept = (summed(parts) == wanted).reshape(largest, -1).all(axis=1)
    return (Measured(input_bits=1 + leading(seen), bits=1 + leading(kept), reach=1 + largest),)


def _cancelling(dtype: str, world: int) -> tuple[int, Floats, Floats]:
    """Sums of ``2^s + 1``, and from three ranks on of ``2^s + 1 - 2^s`` with the three on any neighbours in any order:
    the largest s, ``[ranks, columns]`` by s, and what must come out."""
    bits = format_of(dtype).bits
    if world < 3:
        largest = bits - 1
        size = np.ldexp(1.0, np.arange(1, largest + 1))
        return largest, np.stack([size, np.ones_like(size)]), size + 1
    largest = 15 if dtype == "float16" else ACCUMULATOR_BITS - 1
    orders = ((0, 1, 2), (0, 2, 1), (1, 0, 2))
    parts = np.zeros((world, largest, world, len(orders)))
    for s in range(largest):
        for first in range(world):
            for i, order in enumerate(orders):
                for place, value in zip(order, (2.0 ** (s + 1), 1.0, -(2.0 ** (s + 1))), strict=True):
                    parts[(first + place) % world, s, first, i] = value
    flat = parts.reshape(world, -1)
    return largest, flat, np.ones(flat.shape[1])
