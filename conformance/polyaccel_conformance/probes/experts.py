"""Sums of ``moe_experts``, through the one expert that every token chooses: gate_up, down and the adapters' h."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from polyaccel.backend import AdapterRows
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Choice
from polyaccel_conformance.harness.probes import Measured, Sum, measure, small_units
from polyaccel_conformance.operand import Operand
from polyaccel_conformance.probes.planted import LENGTH, different, every_row, picked, plain, run, stored
from polyaccel_conformance.probes.products import GATE
from polyaccel_conformance.problems.expert_weights import ExpertModule, ExpertWeight
from polyaccel_conformance.problems.moe_experts import DOWN, FILLED, GATE_UP, MoeExpertsProblem

Floats = npt.NDArray[np.float64]


def moe_experts(bench: Bench, dtype: str, k: int) -> tuple[Measured, ...]:
    """Each sum is read through identities before and after it."""

    def gate_up(x: Floats, factors: Floats) -> Floats:
        up, index = different(factors)
        return picked(_experts(bench, dtype, x, up, np.eye(len(up)), None), index)

    def shrunk(x: Floats, factors: Floats) -> Floats:
        a, index = different(factors)
        nothing = np.zeros((len(a), x.shape[1]))
        return picked(_experts(bench, dtype, x, nothing, np.eye(len(a)), (a, np.eye(len(a)))), index)

    def down(x: Floats, factors: Floats) -> Floats:
        matrix, index = different(factors)
        return picked(_experts(bench, dtype, x, np.eye(x.shape[1]), matrix, None), index)

    return (
        measure(dtype, Sum(name="gate_up", k=LENGTH, evaluate=gate_up, units=small_units(dtype))),
        measure(dtype, Sum(name="down", k=LENGTH, evaluate=down, units=small_units(dtype))),
        measure(dtype, Sum(name="x A", k=LENGTH, evaluate=shrunk, units=small_units(dtype))),
    )


def _experts(
    bench: Bench, dtype: str, x: Floats, up: Floats, down: Floats, adapter: tuple[Floats, Floats] | None
) -> Floats:
    """``down (up x)`` of ``x: [rows, k]``, ``up: [inner, k]``, ``down: [n, inner]``: the gate is open."""
    (rows, k), inner, n = x.shape, len(up), len(down)
    hidden = max(k, n)
    axes: dict[str, Choice] = {
        "dims.tokens": rows,
        "dims.hidden": hidden,
        "dims.intermediate": inner,
        "dims.experts": 1,
        "dims.top_k": 1,
        "structure.quantised": False,
        "structure.bits": 4,
        "structure.group_size": 32,
        "structure.scale_dtype": "float16",
        "structure.bias": False,
        "structure.histogram": "random",
        "structure.expert_map": "none",
        "structure.adapters": "none",
        "structure.ranks": "one",
        "structure.mix": "one",
        "attributes.act": "silu",
    }
    problem = MoeExpertsProblem(plain("moe_experts", dtype, axes))
    rank_rows = 0 if adapter is None else len(adapter[0])
    both, back = np.zeros((1, 2 * inner, hidden)), np.zeros((1, hidden, inner))
    # silu multiplies by the gate; what passes it is divided by it beforehand, so that act is the sum itself.
    both[0, inner:, :k], back[0, :n] = up / GATE, down
    bias = np.concatenate([np.full(inner, GATE), np.zeros(inner)])[None]
    problem.gate_up = _weight(GATE_UP, both, (inner, inner), dtype, bias, rank_rows)
    problem.down = _weight(DOWN, back, (hidden,), dtype, None, rank_rows)
    values = np.zeros((rows, hidden))
    values[:, :k] = x
    problem.operands = {
        "x": stored(values, dtype),
        "ids": Operand(np.zeros((rows, 1), dtype=np.int64), "int32"),
        "weights": Operand(np.ones((rows, 1)), "float32"),
    }
    problem.triples = AdapterRows()
    if adapter is not None:
        a, b = np.zeros((rank_rows, hidden)), adapter[1] / GATE
        a[:, :k] = adapter[0]
        problem.adapters = {FILLED[0]: [ExpertModule(site=GATE_UP, slice=1, expert=0, a=a, b=b)]}
        problem.triples = every_row(rows, FILLED[0])
        problem.rank_rows = rank_rows
    return run(bench, problem, "y")[:, :n]


def _weight(
    site: str, matrix: Floats, slices: tuple[int, ...], dtype: str, bias: Floats | None, rank_rows: int
) -> ExpertWeight:
    return ExpertWeight(
        site=site,
        matrix=stored(matrix, dtype),
        bias=None if bias is None else stored(bias, dtype),
        slices=slices,
        codes=None,
        rank_rows=rank_rows,
    )
