"""What a call of a fused product breaks, read from the descriptors that reached CANN. Not the simulator's own rules.

The rows are those of the table of constraints in the documents of MatmulAllReduce, MatmulReduceScatter and
AllGatherMatmul (ops-transformer, mc2/*/docs; op-plugin, docs/custom_APIs).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch

Found = tuple[str, str]
"""A row of the table and what breaks it."""

COLUMNS = ("all_reduce", "reduce_scatter", "all_gather")
ROWS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "chips": COLUMNS,
        "world size": COLUMNS,
        "x1": COLUMNS,
        "x2": COLUMNS,
        "k": COLUMNS,
        "empty tensors": ("all_reduce", "reduce_scatter"),
        "bias": COLUMNS,
        "reduce_op / comm_turn": COLUMNS,
        "comm domain": COLUMNS,
        "use": COLUMNS,
        "A16W8": ("all_reduce",),
        "A8W8": COLUMNS,
        "CANN/driver": COLUMNS,
    }
)
"""The table: constraints by operator. Cells that the documents leave empty are missing."""

_TAIL = ("group", "reduce_op", "comm_turn", "stream_mode")
_SIGNATURES: Mapping[str, tuple[str, tuple[str, ...]]] = MappingProxyType(
    {
        "aclnnMatmulAllReduce": ("all_reduce", ("x1", "x2", "bias", *_TAIL, "out")),
        "aclnnMatmulAllReduceV2": ("all_reduce", ("x1", "x2", "bias", "x3", *_TAIL, "out")),
        "aclnnWeightQuantMatmulAllReduce": (
            "all_reduce",
            ("x1", "x2", "bias", "scale", "offset", "x3", *_TAIL, "group_size", "out"),
        ),
        "aclnnQuantMatmulAllReduce": ("all_reduce", ("x1", "x2", "bias", "x3", "scale", *_TAIL, "out")),
        "aclnnQuantMatmulAllReduceV2": (
            "all_reduce",
            ("x1", "x2", "bias", "x3", "scale", "pertoken", *_TAIL, "out"),
        ),
        "aclnnMatmulReduceScatter": ("reduce_scatter", ("x1", "x2", "bias", *_TAIL, "out")),
        "aclnnAllGatherMatmul": (
            "all_gather",
            ("x1", "x2", "bias", "group", "gather_index", "comm_turn", "stream_mode", "out", "gathered"),
        ),
    }
)
HALF = (torch.float16, torch.bfloat16)
OLDEST_CANN = "8.0.RC2"
TOO_OLD = ("8.0.RC1",)


@dataclass
class Facts:
    """What a call's legality depends on beside its arguments.

    Attributes:
        chip: as the simulator names it.
        groups: ranks by communicator.
        cann: version; empty for one that is new enough.
        decode: the step is one of decode alone.
        used: communicators that fused operators of this process have used, in order.
    """

    chip: str
    groups: Mapping[str, int]
    cann: str = ""
    decode: bool = False
    used: list[str] = field(default_factory=list)

    @property
    def functions(self) -> tuple[str, ...]:
        """The fused functions."""
        return tuple(_SIGNATURES)


@dataclass(frozen=True)
class Fused:
    """One call: the operator, the function, and the arguments by name."""

    column: str
    function: str
    given: Mapping[str, Any]

    def tensor(self, name: str) -> Any:
        return self.given.get(name)

    @property
    def dtypes(self) -> tuple[torch.dtype | None, torch.dtype | None]:
        return self.given["x1"].dtype, self.given["x2"].dtype


def fused(call: Any) -> Fused | None:
    """A ledger's entry as a fused product; None if it is another function.

    Raises:
        AssertionError: it is one of a fused product that this module does not know.
    """
    if call.name not in _SIGNATURES:
        assert "AllReduce" not in call.name or call.name.startswith("Hccl"), f"unknown fused function {call.name}"
        return None
    column, names = _SIGNATURES[call.name]
    return Fused(column, call.name, dict(zip(names, call.arguments, strict=True)))


def found_in(call: Any, facts: Facts) -> list[Found]:
    """Every row that a call of the simulator's ledger breaks."""
    one = fused(call)
    if one is None:
        return []
    found = [(row, text) for row, rule in RULES.items() for text in rule(one, facts)]
    group = one.given["group"]
    if group in facts.groups and group not in facts.used:
        facts.used.append(group)
    return found


def dense(tensor: Any) -> bool:
    """Whether elements lie in the order of the axes without gaps."""
    step = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride), strict=True):
        if size != 1 and stride != step:
            return False
        step *= size
    return True


def transpose_of_dense(tensor: Any) -> bool:
    if len(tensor.shape) != 2:
        return False
    (rows, columns), (down, across) = tensor.shape, tensor.stride
    return bool((rows == 1 or down == 1) and (columns == 1 or across == rows))


def _chip(call: Fused, facts: Facts) -> Iterator[str]:
    legal = ("910B",) if call.column == "all_reduce" else ("910B", "A3")
    if facts.chip not in legal:
        yield f"{call.function} on {facts.chip}"


def _world(call: Fused, facts: Facts) -> Iterator[str]:
    size = facts.groups.get(call.given["group"])
    if call.column == "all_reduce":
        legal: tuple[int, ...] = (1, 2, 4, 8)
    else:
        legal = (2, 4, 8) if facts.chip == "910B" else (2, 4, 8, 16, 32)
    if size is not None and size not in legal:
        yield f"{size} ranks"


def _x1(call: Fused, facts: Facts) -> Iterator[str]:
    x1, x2 = call.tensor("x1"), call.tensor("x2")
    if not dense(x1):
        yield f"x1 is strided: {x1!r}"
    if len(x1.shape) not in ((2, 3) if call.column == "all_reduce" else (2,)):
        yield f"x1 has {len(x1.shape)} dimensions"
    if x1.dtype not in (*HALF, torch.int8):
        yield f"x1 is {x1.dtype}"
    if x2.dtype != torch.int8 and x1.dtype != x2.dtype:
        yield f"x1 is {x1.dtype}, x2 is {x2.dtype}"
    size = facts.groups.get(call.given["group"], 1)
    if call.column == "reduce_scatter" and x1.shape[0] % size:
        yield f"{x1.shape[0]} rows for {size} ranks"


def _x2(call: Fused, facts: Facts) -> Iterator[str]:
    x2 = call.tensor("x2")
    if len(x2.shape) != 2:
        yield f"x2 has {len(x2.shape)} dimensions"
    elif not dense(x2) and not transpose_of_dense(x2):
        yield f"x2 is strided otherwise than by a transpose: {x2!r}"
    if x2.format not in (2, 29):
        yield f"x2 has format {x2.format}"


def _k(call: Fused, facts: Facts) -> Iterator[str]:
    x1, x2 = call.tensor("x1"), call.tensor("x2")
    k = x1.shape[-1]
    if len(x2.shape) == 2 and x2.shape[0] != k:
        yield f"k is {k} and {x2.shape[0]}"
    if call.column != "all_reduce":
        if not 256 <= k < 65535:
            yield f"k is {k}"
    elif k > (65535 if torch.int8 in call.dtypes else 2**31 - 1):
        yield f"k is {k}"


def _empty(call: Fused, facts: Facts) -> Iterator[str]:
    shapes = call.tensor("x1").shape, call.tensor("x2").shape
    if call.column == "all_reduce" and 0 in (*shapes[0], *shapes[1]):
        yield f"operands of {shapes[0]} and {shapes[1]}"
    if call.column == "reduce_scatter" and shapes[0][-1] == 0:
        yield "k is 0"


def _bias(call: Fused, facts: Facts) -> Iterator[str]:
    bias, x3 = call.tensor("bias"), call.tensor("x3")
    if bias is not None:
        if call.column != "all_reduce":
            yield "a bias, which must be zero"
        if bias.shape != (call.tensor("x2").shape[-1],):
            yield f"bias is {bias.shape}"
        if not dense(bias):
            yield "bias is strided"
        if call.dtypes == (torch.int8, torch.int8) and bias.dtype != torch.int32:
            yield f"bias is {bias.dtype}"
    if x3 is not None and not dense(x3):
        yield "x3 is strided"


def _reduction(call: Fused, facts: Facts) -> Iterator[str]:
    given = call.given
    if given.get("reduce_op", "sum") != "sum":
        yield f"reduce_op {given['reduce_op']}"
    for name in ("comm_turn", "gather_index"):
        if given.get(name, 0) != 0:
            yield f"{name} {given[name]}"


def _domain(call: Fused, facts: Facts) -> Iterator[str]:
    group = call.given["group"]
    if group not in facts.groups:
        yield f"no communicator {group!r}"
    elif facts.chip == "910B" and facts.used and group != facts.used[0]:
        yield f"communicator {group!r} after {facts.used[0]!r}"


def _use(call: Fused, facts: Facts) -> Iterator[str]:
    if facts.decode:
        yield f"{call.function} in a step of decode"


def _a16w8(call: Fused, facts: Facts) -> Iterator[str]:
    if call.function != "aclnnWeightQuantMatmulAllReduce":
        return
    scale, offset, size = call.tensor("scale"), call.tensor("offset"), call.given["group_size"]
    k, n = call.tensor("x2").shape
    if size and (size % 32 or not 32 <= size <= k - 1):
        yield f"groups of {size} of {k}"
    legal = [(-(-k // size), n)] if size else [(1,), (n,), (1, n)]
    if scale is None or tuple(scale.shape) not in legal:
        yield f"scale {scale!r}"
    if offset is not None and scale is not None and offset.shape != scale.shape:
        yield f"offset {offset!r}"


def _a8w8(call: Fused, facts: Facts) -> Iterator[str]:
    if call.dtypes[0] != torch.int8:
        return
    scale, token = call.tensor("scale"), call.tensor("pertoken")
    if call.column != "all_reduce":
        yield "integers without aiv"
        return
    packed = (torch.int64, torch.uint64, torch.bfloat16)
    if scale is None or scale.dtype not in (packed if token is None else (torch.float32, torch.bfloat16)):
        yield f"scale {scale!r}"
    if token is not None:
        rows = 1
        for size in call.tensor("x1").shape[:-1]:
            rows *= size
        if token.shape != (rows,):
            yield f"token scale {token!r}"
        if not dense(token):
            yield "token scale is strided"


def _cann(call: Fused, facts: Facts) -> Iterator[str]:
    if facts.cann in TOO_OLD:
        yield f"CANN {facts.cann}; {OLDEST_CANN} is the first"


Rule = Callable[[Fused, Facts], Iterator[str]]
RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "chips": _chip,
        "world size": _world,
        "x1": _x1,
        "x2": _x2,
        "k": _k,
        "empty tensors": _empty,
        "bias": _bias,
        "reduce_op / comm_turn": _reduction,
        "comm domain": _domain,
        "use": _use,
        "A16W8": _a16w8,
        "A8W8": _a8w8,
        "CANN/driver": _cann,
    }
)
"""By row of the table."""
