"""Stations: the parts of a layer that a backend may fuse. Models call these; the plan expands them where it must.

A station's meaning is the composition of its parts. A fused form may round less often; layouts between its parts are
its own affair, so that a shrink may be folded into the base GEMM, an expand into the next kernel, and rank rows may
ride on the reduction. Bodies here use operators and views only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch

from polyaccel.backend.communicator import Communicator
from polyaccel.backend.kv_cache import KVCache
from polyaccel.backend.rope import RopeTable
from polyaccel.backend.spec import OperatorSpec
from polyaccel.backend.step import RowSet, Step
from polyaccel.backend.support import Query
from polyaccel.backend.vocabulary import COMM, KV, ROW_SET, SGMV_NUMERICS, STEP, WEIGHT, attribute, kind, tensor
from polyaccel.backend.weight import Weight

Operators = Mapping[str, Callable[..., object]]
Body = Callable[..., object]

_X = tensor("x", "[T, k]")

STATIONS: MappingProxyType[str, OperatorSpec] = MappingProxyType(
    {
        spec.name: spec
        for spec in (
            OperatorSpec(
                name="column_linear",
                group="station",
                semantics="linear + the step's adapters on the row set.",
                arguments=(_X, WEIGHT, STEP, ROW_SET),
                returns="y: [T, n]",
                numerics=SGMV_NUMERICS,
                parts=("linear", "sgmv"),
            ),
            OperatorSpec(
                name="qkv_rope_cache",
                group="station",
                semantics=(
                    "linear over slices q, k, v + adapters + (where norms are given) per-head rms_norm of q and k + "
                    "rotary + "
                    "write_kv_cache."
                ),
                arguments=(
                    _X,
                    WEIGHT,
                    STEP,
                    kind("rope", "rope"),
                    tensor("q_norm", "[head_dim]", optional=True),
                    tensor("k_norm", "[head_dim]", optional=True),
                    attribute("eps"),
                    KV,
                    attribute("layer"),
                    attribute("head_dim"),
                ),
                returns="q: [T, heads, head_dim]",
                numerics=SGMV_NUMERICS,
                parts=("linear", "sgmv", "rms_norm", "rotary_embedding", "write_kv_cache"),
            ),
            OperatorSpec(
                name="gate_up_act",
                group="station",
                semantics="linear over slices gate and up + adapters + activation: ``act(gate) * up``.",
                arguments=(_X, WEIGHT, STEP, attribute("act", "silu")),
                returns="[T, intermediate]",
                numerics=SGMV_NUMERICS,
                parts=("linear", "sgmv", "silu_and_mul"),
            ),
            OperatorSpec(
                name="row_parallel_linear",
                group="station",
                semantics=(
                    "linear on this rank's input columns + adapters, summed over ranks when ``reduce``. Adapters "
                    "enter as "
                    "``add`` (each rank adds its partial delta before the sum) or ``ride`` (rank rows are summed "
                    "along with the "
                    "output and expanded after). A bias is added once, whatever the world size: only rank 0 holds one."
                ),
                arguments=(_X, WEIGHT, STEP, COMM, attribute("reduce", True, False)),
                returns="y: [T, n]",
                numerics=SGMV_NUMERICS,
                parts=("linear", "sgmv", "all_reduce"),
            ),
            OperatorSpec(
                name="row_parallel_add_norm",
                group="station",
                semantics="row_parallel_linear, then rms_norm with the residual: returns (normed, residual). "
                "The residual may be added at any place of the sum.",
                arguments=(
                    _X,
                    WEIGHT,
                    STEP,
                    COMM,
                    tensor("residual", "[T, n]"),
                    tensor("norm_weight", "[n]"),
                    attribute("eps"),
                ),
                returns="(normed: [T, n], residual: [T, n])",
                numerics=SGMV_NUMERICS,
                parts=("row_parallel_linear", "rms_norm"),
            ),
        )
    }
)


def parts_of(station: str, query: Query) -> tuple[str, ...]:
    """The parts that a station needs for this query, in order of use."""
    parts = STATIONS[station].parts
    if not query.adapters:
        parts = tuple(p for p in parts if p != "sgmv")
    if station == "qkv_rope_cache" and not query.static.get("qk_norm"):
        parts = tuple(p for p in parts if p != "rms_norm")
    if query.integer("world_size", 1) == 1:
        parts = tuple(p for p in parts if p != "all_reduce")
    return parts


def build(station: str, operators: Operators) -> Body:
    """The station as a callable over its resolved ``operators`` (keyed by part)."""
    return _BUILDERS[station](operators)


def _column_linear(op: Operators) -> Body:
    linear, sgmv = op["linear"], op.get("sgmv")

    def column_linear(x: torch.Tensor, weight: Weight, step: Step, row_set: RowSet = "tokens") -> object:
        y = linear(x, weight)
        return y if sgmv is None else sgmv(y, x, weight, step, row_set)

    return column_linear


def _qkv_rope_cache(op: Operators) -> Body:
    column_linear = _column_linear(op)
    norm, rotate, store = op.get("rms_norm"), op["rotary_embedding"], op["write_kv_cache"]

    def qkv_rope_cache(
        x: torch.Tensor,
        weight: Weight,
        step: Step,
        rope: RopeTable,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
        eps: float,
        kv: KVCache,
        layer: int,
        head_dim: int,
    ) -> object:
        y = _tensor(column_linear(x, weight, step, "tokens"))
        widths = [part.n for part in weight.spec.slices]
        parts = torch.split(y, widths, dim=-1)
        q, k, v = (part.view(len(y), n // head_dim, head_dim) for part, n in zip(parts, widths, strict=True))
        if norm is not None:
            q, k = _tensor(norm(q, q_norm, eps)), _tensor(norm(k, k_norm, eps))
        rotated = rotate(q, k, rope, step)
        assert isinstance(rotated, tuple)
        store(rotated[1], v, kv, layer, step)
        return rotated[0]

    return qkv_rope_cache


def _tensor(value: object) -> torch.Tensor:
    assert isinstance(value, torch.Tensor)
    return value


def _gate_up_act(op: Operators) -> Body:
    column_linear, activate = _column_linear(op), op["silu_and_mul"]

    def gate_up_act(x: torch.Tensor, weight: Weight, step: Step, act: str = "silu") -> object:
        return activate(column_linear(x, weight, step, "tokens"))

    return gate_up_act


def _row_parallel_linear(op: Operators) -> Body:
    column_linear, reduce_ranks = _column_linear(op), op.get("all_reduce")

    def row_parallel_linear(
        x: torch.Tensor, weight: Weight, step: Step, comm: Communicator, reduce: bool = True
    ) -> object:
        y = column_linear(x, weight, step, "tokens")
        return reduce_ranks(y, comm) if reduce and reduce_ranks is not None else y

    return row_parallel_linear


def _row_parallel_add_norm(op: Operators) -> Body:
    row_parallel_linear, norm = op["row_parallel_linear"], op["rms_norm"]

    def row_parallel_add_norm(
        x: torch.Tensor,
        weight: Weight,
        step: Step,
        comm: Communicator,
        residual: torch.Tensor,
        norm_weight: torch.Tensor,
        eps: float,
    ) -> object:
        return norm(row_parallel_linear(x, weight, step, comm), norm_weight, eps, residual)

    return row_parallel_add_norm


_BUILDERS: Mapping[str, Callable[[Operators], Body]] = MappingProxyType(
    {
        "column_linear": _column_linear,
        "qkv_rope_cache": _qkv_rope_cache,
        "gate_up_act": _gate_up_act,
        "row_parallel_linear": _row_parallel_linear,
        "row_parallel_add_norm": _row_parallel_add_norm,
    }
)
