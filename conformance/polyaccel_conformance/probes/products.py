"""Sums of ``linear``, of the adapters' operators and of the stations: x W^T, h = x A and its product with B."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Choice
from polyaccel_conformance.harness.probes import Measured, Sum, measure, small_units
from polyaccel_conformance.operand import Operand
from polyaccel_conformance.probes.planted import (
    ADAPTED,
    LENGTH,
    different,
    every_row,
    picked,
    plain,
    run,
    source,
    station_axes,
    stored,
)
from polyaccel_conformance.problems.adapters import HostAdapters, HostModule, arrange
from polyaccel_conformance.problems.embedding import EmbeddingProblem
from polyaccel_conformance.problems.linear import LinearProblem
from polyaccel_conformance.problems.sgmv import ExpandProblem, LoraProblem, SgmvProblem, ShrinkProblem, triples_of
from polyaccel_conformance.problems.stations import ColumnLinearProblem, RowParallelLinearProblem, StationProblem
from polyaccel_conformance.problems.stations_mlp import GateUpActProblem
from polyaccel_conformance.problems.stations_norm import RowParallelAddNormProblem
from polyaccel_conformance.problems.stations_qkv import QkvRopeCacheProblem
from polyaccel_conformance.problems.weights import HostWeight

Floats = npt.NDArray[np.float64]
Lora = TypeVar("Lora", bound=LoraProblem)

TILE = 64
"""Rows and columns from which libraries use matrix units: a product with a single column may be another kernel."""

GATE = 32.0
"""A gate at which silu is its argument: 1 + exp(-32) is 1."""


# -- linear ------------------------------------------------------------------------------------------------------------


def linear(bench: Bench, dtype: str, k: int) -> tuple[Measured, ...]:
    """``x W^T``, of a few rows and columns and of a tile of them."""

    def evaluate(a: Floats, b: Floats) -> Floats:
        w, index = different(b)
        rows, columns = -(-TILE // len(a)), -(-TILE // len(w))
        narrow = _multiply(bench, dtype, a, w)
        wide = _multiply(bench, dtype, np.tile(a, (rows, 1)), np.tile(w, (columns, 1)))
        found = picked(narrow, index)
        return np.where(found == picked(wide[: len(a)], index), found, np.nan)

    return (measure(dtype, Sum(k=k, evaluate=evaluate), rounding=True),)


def _multiply(bench: Bench, dtype: str, x: Floats, w: Floats) -> Floats:
    return run(bench, PlantedLinear(dtype, x, w), "y")


class PlantedLinear(LinearProblem):
    """``linear`` of ``x: [tokens, k]`` and ``w: [n, k]``, which the dtype holds: nothing is drawn."""

    def __init__(self, dtype: str, x: Floats, w: Floats) -> None:
        self._planted = x, w
        sizes: dict[str, Choice] = {"dims.tokens": len(x), "dims.k": x.shape[1], "dims.n": len(w)}
        super().__init__(plain("linear", dtype, {**sizes, "structure.slices": "one", "structure.bias": False}))

    def draw(self) -> None:
        x, w = (Operand(values, self.case.dtype) for values in self._planted)
        self.operands = {"x": x}
        self.weight = HostWeight(matrix=w, slices=w.shape[:1])


# -- adapters ----------------------------------------------------------------------------------------------------------


def sgmv(bench: Bench, dtype: str, k: int) -> tuple[Measured, ...]:
    """``x A``, read through an identity for B, and ``h B``, with an identity for A."""

    def evaluate(x: Floats, a: Floats, b: Floats) -> Floats:
        problem = _adapted(SgmvProblem, "sgmv", dtype, len(x), a, b)
        problem.operands = {"y": stored(np.zeros((len(x), len(b))), dtype), "x": stored(x, dtype)}
        return run(bench, problem, "y")

    return _both_sums(dtype, evaluate)


def sgmv_shrink(bench: Bench, dtype: str, k: int) -> tuple[Measured, ...]:
    """``x A``."""

    def evaluate(x: Floats, b: Floats) -> Floats:
        a, index = different(b)
        problem = _adapted(ShrinkProblem, "sgmv_shrink", dtype, len(x), a, np.eye(1, len(a)))
        problem.operands = {"x": stored(x, dtype)}
        return picked(run(bench, problem, "h")[:, 0], index)

    return (measure(dtype, Sum(name="x A", k=LENGTH, evaluate=evaluate, units=small_units(dtype))),)


def sgmv_expand(bench: Bench, dtype: str, k: int) -> tuple[Measured, ...]:
    """``h B``."""

    def evaluate(h: Floats, factors: Floats) -> Floats:
        b, index = different(factors)
        problem = _adapted(ExpandProblem, "sgmv_expand", dtype, len(h), np.eye(h.shape[1], 8), b)
        problem.operands = {"y": stored(np.zeros((len(h), len(b))), dtype), "h": stored(h[:, None], dtype)}
        return picked(run(bench, problem, "y"), index)

    return (measure(dtype, Sum(name="h B", k=LENGTH, evaluate=evaluate, units=small_units(dtype))),)


def embedding(bench: Bench, dtype: str, k: int) -> tuple[Measured, ...]:
    """``B A[:, id]``: token i looks up row i of a table of zeros."""

    def evaluate(a: Floats, factors: Floats) -> Floats:
        b, index = different(factors)
        rows = len(a)
        sizes: dict[str, Choice] = {"dims.tokens": rows, "dims.n": rows, "dims.k": len(b), "dims.rank": 1}
        axes: dict[str, Choice] = {**ADAPTED, **sizes, "attributes.vocabulary_start": 0, "structure.ids": "inside"}
        problem = EmbeddingProblem(plain("embedding", dtype, axes))
        problem.weight = HostWeight(matrix=stored(np.zeros((rows, len(b))), dtype), slices=(rows,), lookup=True)
        problem.adapters = _one_adapter((HostModule(a=stored(a.T, dtype), b=stored(b, dtype)),), lookup=True)
        problem.rows = every_row(rows, _slot(problem.adapters))
        problem.ids = np.arange(rows)
        return picked(run(bench, problem, "x"), index)

    return (measure(dtype, Sum(name="A B", k=LENGTH, evaluate=evaluate, units=small_units(dtype))),)


def _both_sums(dtype: str, evaluate: Callable[[Floats, Floats, Floats], Floats]) -> tuple[Measured, ...]:
    """``x A`` and ``h B`` of what takes ``x: [rows, k]``, ``a: [rank, k]`` and ``b: [n, rank]``."""

    def shrunk(x: Floats, factors: Floats) -> Floats:
        a, index = different(factors)
        return picked(evaluate(x, a, np.eye(len(a))), index)

    def expanded(h: Floats, factors: Floats) -> Floats:
        b, index = different(factors)
        return picked(evaluate(h, np.eye(h.shape[1]), b), index)

    return (
        measure(dtype, Sum(name="x A", k=LENGTH, evaluate=shrunk, units=small_units(dtype))),
        measure(dtype, Sum(name="h B", k=LENGTH, evaluate=expanded, units=small_units(dtype))),
    )


def _adapted(kind: type[Lora], operator: str, dtype: str, rows: int, a: Floats, b: Floats) -> Lora:
    """Every row uses one adapter ``a: [rank, k]``, ``b: [n, rank]``."""
    sizes: dict[str, Choice] = {"dims.tokens": rows, "dims.k": a.shape[1], "dims.n": len(b), "dims.rank": 1}
    more: dict[str, Choice] = {"attributes.row_set": "tokens", "structure.h": "x", "structure.wide_h": False}
    problem = kind(plain(operator, dtype, {**ADAPTED, **sizes, **more}))
    problem.weight = HostWeight(matrix=stored(np.zeros((len(b), a.shape[1])), dtype), slices=(len(b),))
    problem.adapters = _one_adapter((HostModule(a=stored(a, dtype), b=stored(b, dtype)),))
    problem.rows = every_row(rows, _slot(problem.adapters))
    problem.triples = triples_of(problem.rows)
    return problem


def _one_adapter(modules: tuple[HostModule | None, ...], *, lookup: bool = False) -> HostAdapters:
    return arrange(source(), [modules], lookup=lookup)


def _slot(adapters: HostAdapters) -> int:
    (slot,) = adapters.adapters
    return slot


# -- stations ----------------------------------------------------------------------------------------------------------


def station(operator: str) -> Callable[[Bench, str, int], tuple[Measured, ...]]:
    """``x W^T`` and both sums of the adapters, through everything that follows in the station."""

    def probe(bench: Bench, dtype: str, k: int) -> tuple[Measured, ...]:
        def base(x: Floats, factors: Floats) -> Floats:
            w, index = different(factors)
            return picked(_station(bench, operator, dtype, x, w, None), index)

        def adapted(x: Floats, a: Floats, b: Floats) -> Floats:
            return _station(bench, operator, dtype, x, np.zeros((len(b), x.shape[1])), (a, b))

        return (
            measure(dtype, Sum(name="x W", k=LENGTH, evaluate=base, units=small_units(dtype))),
            *_both_sums(dtype, adapted),
        )

    return probe


def _station(
    bench: Bench, operator: str, dtype: str, x: Floats, w: Floats, adapter: tuple[Floats, Floats] | None
) -> Floats:
    """``x W^T + x A B`` of ``[rows, n]``, as it comes out of the station."""
    rows, (n, k) = len(x), w.shape
    problem, read, output = _STATIONS[operator](dtype, rows, n, k)
    slices, place = problem.weight.slices, 1 if operator == "gate_up_act" else 0
    begin = sum(slices[:place])
    matrix = np.zeros((sum(slices), k))
    matrix[begin : begin + n] = w
    problem.weight = HostWeight(matrix=stored(matrix, dtype), slices=slices, bias=problem.weight.bias)
    problem.operands = {**problem.operands, "x": stored(x, dtype)}
    if adapter is not None:
        a, b = adapter
        whole = np.zeros((slices[place], len(a)))
        whole[:n] = b
        modules: list[HostModule | None] = [None] * len(slices)
        modules[place] = HostModule(a=stored(a, dtype), b=stored(whole, dtype))
        problem.adapters = _one_adapter(tuple(modules))
        problem.rows = every_row(rows, _slot(problem.adapters))
    return read(run(bench, problem, output).reshape(rows, -1)[:, :n])


Made = tuple[StationProblem, Callable[[Floats], Floats], str]


def _same(y: Floats) -> Floats:
    return y


def _column(dtype: str, rows: int, n: int, k: int) -> Made:
    axes = station_axes(rows, k, {"dims.n": n, "attributes.row_set": "tokens"})
    return ColumnLinearProblem(plain("column_linear", dtype, axes)), _same, "y"


def _row_parallel(dtype: str, rows: int, n: int, k: int) -> Made:
    axes = station_axes(rows, k, {"dims.n": n, "attributes.reduce": True})
    return RowParallelLinearProblem(plain("row_parallel_linear", dtype, axes)), _same, "y"


def _gate_up(dtype: str, rows: int, n: int, k: int) -> Made:
    axes = station_axes(rows, k, {"dims.n": n, "attributes.act": "silu"})
    problem = GateUpActProblem(plain("gate_up_act", dtype, axes))
    bias = np.concatenate([np.full(n, GATE), np.zeros(n)])
    problem.weight = HostWeight(matrix=problem.weight.matrix, slices=(n, n), bias=stored(bias, dtype))
    return problem, lambda y: y / GATE, "y"


def _add_norm(dtype: str, rows: int, n: int, k: int) -> Made:
    axes = station_axes(rows, k, {"dims.n": n, "attributes.eps": 1e-5})
    problem = RowParallelAddNormProblem(plain("row_parallel_add_norm", dtype, axes))
    problem.operands = {
        **problem.operands,
        "residual": stored(np.zeros((rows, n)), dtype),
        "norm_weight": stored(np.ones(n), dtype),
    }
    return problem, _same, "residual"


def _qkv(dtype: str, rows: int, n: int, k: int) -> Made:
    more: dict[str, Choice] = {
        "dims.heads": -(-n // 2),
        "dims.kv_heads": 1,
        "dims.head_dim": 2,
        "dims.rotary_dim": 2,
        "attributes.eps": 1e-5,
        "attributes.layer": 0,
        "structure.q_norm_k_norm": False,
        "structure.style": "half",
        "structure.blocks": "ascending",
    }
    problem = QkvRopeCacheProblem(plain("qkv_rope_cache", dtype, station_axes(rows, k, more)))
    problem.cos = stored(np.ones(problem.cos.shape), "float32")
    problem.sin = stored(np.zeros(problem.sin.shape), "float32")
    return problem, _same, "q"


_STATIONS: dict[str, Callable[[str, int, int, int], Made]] = {
    "column_linear": _column,
    "row_parallel_linear": _row_parallel,
    "gate_up_act": _gate_up,
    "row_parallel_add_norm": _add_norm,
    "qkv_rope_cache": _qkv,
}
