"""HCCL's numbers: results, data types, reductions (Ascend/pytorch third_party/hccl/inc/hccl/hccl_types.h)."""

from __future__ import annotations

import enum

import torch

from ..errors import Refused
from ..soc import Chip


class Result(enum.IntEnum):
    """HcclResult, as far as the simulator returns it."""

    SUCCESS = 0
    PARAMETER = 1
    POINTER = 2
    INTERNAL = 4
    NOT_SUPPORTED = 5
    NOT_FOUND = 6
    TIMEOUT = 9
    REMOTE = 21


class HcclRefused(Refused):
    """An HCCL function fails: `code` is a Result. Prefixes: EI0003 parameter, EI0006 no link, EI0002 no answer.

    Prefixes: cann/hccl docs/zh/user_guide/fault_diagnosis/debug_thinking.md.
    """

    def __init__(self, code: Result, text: str, prefix: str = "EI0003") -> None:
        super().__init__(int(code), text, prefix)


DTYPES: dict[int, torch.dtype] = {
    0: torch.int8,
    1: torch.int16,
    2: torch.int32,
    3: torch.float16,
    4: torch.float32,
    5: torch.int64,
    7: torch.uint8,
    10: torch.float64,
    11: torch.bfloat16,
}
"""HcclDataType by number, for the types that gloo carries as they are."""

_REDUCED = {
    # HcclAllReduce.md, HcclReduceScatter.md, HcclReduce.md: "data types", per product.
    Chip.A2: {torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.float32, torch.bfloat16},
    Chip.A3: {torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.float32, torch.bfloat16},
    Chip.P310: {torch.int8, torch.int16, torch.int32, torch.float16, torch.float32},
}

OPERATIONS = {0: "sum", 1: "prod", 2: "max", 3: "min"}
"""HcclReduceOp by number."""

_NO_PRODUCT = {torch.int16, torch.bfloat16}  # the same pages: "prod does not support int16 and bfp16"


def dtype_of(function: str, number: int) -> torch.dtype:
    """torch's type of an HcclDataType; refused where the simulator carries none (HCCL_E_PARA)."""
    if number not in DTYPES:
        raise HcclRefused(Result.PARAMETER, f"{function}: data type {number} is not simulated.")
    return DTYPES[number]


def check_move(function: str, chip: Chip, dtype: torch.dtype) -> None:
    """Types that collectives without arithmetic carry: on the 310P no bfp16 (HcclAllGather.md, HcclBroadcast.md)."""
    if chip is Chip.P310 and dtype == torch.bfloat16:
        raise HcclRefused(Result.NOT_SUPPORTED, f"{function}: {dtype} is not supported on this chip.")


def check_reduce(function: str, chip: Chip, dtype: torch.dtype, operation: int) -> str:
    """The name of a reduction that this chip supports for `dtype` (HCCL_E_PARA, HCCL_E_NOT_SUPPORT)."""
    name = OPERATIONS.get(operation)
    if name is None:
        raise HcclRefused(Result.PARAMETER, f"{function}: reduce operation {operation} is unknown.")
    if dtype not in _REDUCED[chip] or (name == "prod" and dtype in _NO_PRODUCT):
        raise HcclRefused(Result.NOT_SUPPORTED, f"{function}: {name} of {dtype} is not supported on this chip.")
    return name
