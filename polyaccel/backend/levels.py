"""What a backend must do right to earn a level: the required tables, versioned with the contract.

A row of a table says which cases must exist, run natively where the backend claims the operator, and pass: an operator,
its dtypes, every layout that its arguments accept, every value of its listed attributes, and ranges of sizes. Each
value and each range is one *cell*. A level is earned by its cells, not by a share of cases: one empty, refused or wrong
cell is enough to lose it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from polyaccel.backend.vocabulary import OPERATORS

HALF = "16-bit"
"""float16 or bfloat16, whichever a backend does better: one of the two must be right for a level."""

DEVICES = "devices"
GRAPHS = "graphs"
"""What a cell may need of the machine; without it the cell is not exercised instead of empty."""

Value = int | str | bool


@dataclass(frozen=True, slots=True)
class Span:
    """Integers from ``low`` to ``high``, both included."""

    low: int
    high: int

    def __contains__(self, value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and self.low <= value <= self.high

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}..{self.high}"


def _empty() -> Mapping[str, tuple[Value | Span, ...]]:
    return MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirement:
    """One row of a required table.

    Attributes:
        operator: an operator or station.
        dtypes: of activations; :data:`HALF` stands for one of the two 16-bit types, empty for an operator without.
        each: by the name of an axis of a case (``dims.k``, ``structure.bias``, ``facts.rank``), the values and ranges
            of which every one must be covered. A structure that holds several integers covers each of them.
        where: only cases with these values count, such as those on quantised weights.
        layouts: every layout that the specification of each tensor argument accepts is a cell.
        attributes: every value that the specification lists for an attribute is a cell.
        needs: what the machine must have, :data:`DEVICES` or :data:`GRAPHS`; empty for nothing.
    """

    operator: str
    dtypes: tuple[str, ...] = ("float32", HALF)
    each: Mapping[str, tuple[Value | Span, ...]] = field(default_factory=_empty)
    where: Mapping[str, Value] = field(default_factory=lambda: MappingProxyType({}))
    layouts: bool = True
    attributes: bool = True
    needs: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """A level: ``name`` L0 to L7, what it is called, the levels it builds on, its table, and the questions without an
    operator that must be answered (checks by name)."""

    name: str
    title: str
    builds_on: tuple[str, ...] = ()
    table: tuple[Requirement, ...] = ()
    checks: tuple[str, ...] = ()

    @property
    def operators(self) -> tuple[str, ...]:
        """Every operator of the table once, in its order."""
        return tuple(dict.fromkeys(row.operator for row in self.table))


MOST = 16_384
MOST_RANK = 512


def _sizes(low: int, most: int = MOST) -> tuple[Span, ...]:
    """From ``low`` to ``most`` in the steps at which kernels change their mind: empty, one, below and above a tile,
    several tiles, and large (``most`` itself included)."""
    edges = (0, 1, 2, 16, 17, 64, 128, 1024, most)
    cuts = [edge for edge in edges if low <= edge <= most]
    spans = [Span(a, b - 1) for a, b in itertools.pairwise(cuts)]
    return (*spans, Span(most, most))


def _ranges(*edges: int) -> tuple[Span, ...]:
    """From each edge to the one before the next; the last edge ends the last range."""
    *begins, end = edges
    return (*(Span(low, high - 1) for low, high in itertools.pairwise(begins)), Span(begins[-1], end))


def _rows(operators: tuple[str, ...], where: Mapping[str, Value] = MappingProxyType({})) -> tuple[Requirement, ...]:
    return tuple(Requirement(operator=name, where=where, each=_EACH.get(name, _empty())) for name in operators)


def _dtypes(collective: str) -> tuple[str, ...]:
    return () if collective == "barrier" else ("float32", HALF)


_GEMM: Mapping[str, tuple[Value | Span, ...]] = MappingProxyType(
    {
        "dims.tokens": _sizes(0),
        "dims.k": _sizes(0),
        "dims.n": _sizes(1),
        "structure.bias": (False, True),
    }
)
_RANKS = tuple(range(1, MOST_RANK + 1))
_TOKENS = _ranges(0, 1, 2, 16, 64, 129)
_WIDTHS = _ranges(1, 2, 16, 128, 1024, 8192)
_HEADS: Mapping[str, tuple[Value | Span, ...]] = MappingProxyType({"dims.head_dim": _ranges(2, 64, 65, 128, 129, 256)})
_PRODUCT = {"dims.tokens": _TOKENS, "dims.k": _WIDTHS, "dims.n": _WIDTHS}
_EACH: Mapping[str, Mapping[str, tuple[Value | Span, ...]]] = MappingProxyType(
    {
        "embedding": {"dims.tokens": _TOKENS},
        "rms_norm": {"dims.tokens": _ranges(0, 1, 2, 16, 1024), "dims.hidden": _WIDTHS},
        "layer_norm": {"dims.tokens": _ranges(0, 1, 2, 16, 1024), "dims.hidden": _WIDTHS},
        "rotary_embedding": {"dims.tokens": _ranges(0, 1, 2, 16, 64), **_HEADS},
        "silu_and_mul": {"dims.tokens": _ranges(0, 1, 2, 16, 1024), "dims.n": _WIDTHS},
        "gelu": {"dims.tokens": _ranges(0, 1, 2, 16, 1024), "dims.n": _WIDTHS},
        "select_rows": {"dims.tokens": _ranges(0, 1, 2, 16, 64), "dims.hidden": _WIDTHS},
        "write_kv_cache": {"dims.tokens": _ranges(0, 1, 2, 16, 64), **_HEADS},
        "paged_attention": {
            "dims.sequences": _ranges(0, 1, 2, 4),
            "dims.context": _ranges(1, 2, 16, 17, 256, 2048),
            "dims.group": _ranges(1, 2, 8),
            **_HEADS,
        },
        "dense_attention": {"dims.tokens": _ranges(0, 1, 2, 64, 129), "dims.group": _ranges(1, 2, 4), **_HEADS},
        "sample": {"dims.rows": _ranges(0, 1, 2, 8), "dims.vocabulary": _ranges(1, 2, 32, 1024, 32768, 151_936)},
        "column_linear": _PRODUCT,
        "qkv_rope_cache": {"dims.tokens": _TOKENS, "dims.k": _WIDTHS},
        "gate_up_act": _PRODUCT,
        "row_parallel_linear": _PRODUCT,
        "row_parallel_add_norm": _PRODUCT,
        "sgmv_shrink": _PRODUCT,
        "sgmv_expand": _PRODUCT,
        "moe_route": {"dims.tokens": _ranges(0, 1, 2, 16, 500), "dims.experts": _ranges(1, 2, 8, 64, 256)},
        "moe_experts": {
            "dims.tokens": _ranges(0, 1, 2, 16, 64),
            "dims.hidden": _ranges(1, 2, 16, 1024),
            "dims.intermediate": _ranges(1, 2, 16, 1024),
        },
    }
)
"""The ranges of sizes that a level asks for, up to those of models, by operator."""
_COLLECTIVES = tuple(name for name, spec in OPERATORS.items() if spec.group == "ranks")
_SHARDED = (
    "column_linear",
    "row_parallel_linear",
    "row_parallel_add_norm",
    "embedding",
    "sgmv",
    "moe_experts",
)
_DENSE = (
    "embedding",
    "rms_norm",
    "layer_norm",
    "rotary_embedding",
    "silu_and_mul",
    "gelu",
    "select_rows",
    "write_kv_cache",
    "paged_attention",
    "dense_attention",
    "sample",
    "column_linear",
    "qkv_rope_cache",
    "gate_up_act",
    "row_parallel_linear",
    "row_parallel_add_norm",
)

LEVELS: Mapping[str, Level] = MappingProxyType(
    {
        level.name: level
        for level in (
            Level(
                name="L0", title="device", checks=("device.copy_paths", "device.wrong_current", "errors.async_operator")
            ),
            Level(
                name="L1",
                title="linear and copies",
                builds_on=("L0",),
                table=(
                    Requirement(operator="linear", each=_GEMM),
                    Requirement(operator="dequantize"),
                ),
                checks=("device.copy_paths", "storage.weight"),
            ),
            Level(
                name="L2",
                title="dense model",
                builds_on=("L1",),
                table=_rows(_DENSE),
                checks=(
                    "storage.kv",
                    "storage.sampling",
                    "sample.generator",
                    "cache.identity",
                    "model.tokens",
                    "model.layers",
                    "model.float32",
                    "model.crowd",
                    "model.overlap",
                    "model.chunks",
                    "model.prefix_cache",
                    "model.preemption",
                ),
            ),
            Level(
                name="L3",
                title="LoRA",
                builds_on=("L1",),
                table=(
                    Requirement(
                        operator="sgmv",
                        each=MappingProxyType(
                            {
                                **_PRODUCT,
                                "facts.rank": _RANKS,
                                "facts.mixed_ranks": (True,),
                                "facts.rows_without_adapter": (True,),
                                "facts.slice_narrower_than_rank": (True,),
                            }
                        ),
                    ),
                    *_rows(("sgmv_shrink", "sgmv_expand")),
                ),
                checks=("storage.adapters", "lora.native_evidence", "lora.load_cost", "model.adapters"),
            ),
            Level(name="L4", title="mixture of experts", builds_on=("L1",), table=_rows(("moe_route", "moe_experts"))),
            Level(
                name="L5",
                title="quantised weights",
                builds_on=("L1",),
                table=_rows(("dequantize", "linear", "moe_experts"), where=MappingProxyType({"facts.quantised": True})),
            ),
            Level(
                name="L6",
                title="several devices",
                builds_on=("L1",),
                table=(
                    *(Requirement(operator=name, dtypes=_dtypes(name), needs=DEVICES) for name in _COLLECTIVES),
                    # Layouts and attributes are the business of the levels that these operators belong to.
                    *(Requirement(operator=name, needs=DEVICES, layouts=False, attributes=False) for name in _SHARDED),
                ),
                checks=(
                    "model.ranks",
                    "model.layers",
                    "lora.tp_delta_equal",
                    "comm.row_parallel_operands",
                    "comm.collectives",
                    "comm.trace",
                    "comm.memory",
                    "comm.barrier",
                    "comm.back_to_back",
                    "comm.interleaved",
                    "comm.subgroups",
                    "comm.timeout",
                    "comm.failure_on_one_rank",
                ),
            ),
            Level(
                name="L7",
                title="graphs",
                builds_on=("L2",),
                checks=("graph.replay", "graph.adapter_cost", "model.graphs"),
            ),
        )
    }
)
"""The levels in order. L6 adds every world size from 2 to the number of ranks that took part (``ranks``); L7 holds no
operator of its own: it is earned by replaying the dense model's."""
