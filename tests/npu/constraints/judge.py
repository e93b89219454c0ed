"""What is wrong with how a rank answered a case, in words that begin with what kind of fault it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tests.npu.constraints.case import ROW_PARALLEL, StationCase, laid_out

FUSED = frozenset({"aclnnMatmulAllReduce", "aclnnMatmulAllReduceV2"})
SUMS = FUSED | {"HcclAllReduce"}
KINDS = ("witness", "refused", "values", "dtype", "fused", "copies", "sums")
"""Kinds of faults: a row of the table is broken, CANN refused a call, wrong numbers, another dtype, the fused product
where it may not be used or not where it may, copies that are not counted or not needed, a sum that is not made."""


def fuses(chip: str, world: int, case: StationCase) -> bool:
    """Whether the documents let this call be one MatmulAllReduce."""
    return (
        case.station in ROW_PARALLEL
        and chip == "910B"
        and world in (2, 4, 8)
        and case.token_class == "mixed"
        and case.dtype in ("float16", "bfloat16")
        and case.reduce
        and not case.second_group
        and case.rows > 0
    )


def faults(chip: str, world: int, case: StationCase, answer: Mapping[str, Any]) -> list[str]:
    """Everything wrong with one rank's answer."""
    reached = set(answer["reached"])
    found = [f"witness: {text}" for text in answer["broken"]]
    found += [f"refused: {line}" for line in answer["lines"]]
    if not answer["excess"] <= 1.0:
        found.append(f"values: {answer['excess']:.3g} times what rounding explains")
    if answer["dtypes"] != [case.dtype]:
        found.append(f"dtype: {answer['dtypes']}")
    if bool(FUSED & reached) != fuses(chip, world, case):
        found.append(f"fused: {sorted(FUSED & reached)}, though {answer['reasons']}")
    if not answer["composites"]:
        copies = {name: count for name, count in answer["launches"].items() if name.startswith("copy.")}
        strided = not laid_out(case.x(0), case.layout, torch.device("cpu")).is_contiguous()
        if sum(copies.values()) != int(strided):
            found.append(f"copies: {copies} of a {case.layout} x")
    summed = case.station in ROW_PARALLEL and case.reduce and world > 1 and case.rows > 0
    if bool(SUMS & reached) != summed:
        found.append(f"sums: {sorted(SUMS & reached)}")
    return found
