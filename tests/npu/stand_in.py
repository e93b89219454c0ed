"""A stand-in for vllm-ascend's sgmv kernels: the same names and schemas, the arithmetic in float64 on the host.

As those it takes addresses, not layouts: what it reads is what lies densely from a tensor's first element on. Beyond
its limits, where the kernels give numbers that mean nothing, it raises.
"""

from __future__ import annotations

from collections import Counter
from functools import cache

import torch

RANKS = (8, 16, 32, 64)
CALLS: Counter[str] = Counter()
"""Calls so far, by name; tests clear it."""


@cache
def register() -> torch.library.Library:
    """Once a process."""
    library = torch.library.Library("_C_ascend", "DEF")  # type: ignore[no-untyped-call]
    given = "Tensor! x, Tensor! weight, Tensor! lora_indices, Tensor! seq_len, Tensor! y"
    library.define(f"sgmv_shrink({given}, float scale) -> ()")
    library.define(f"sgmv_expand({given}, int slice_offset, int slice_size) -> Tensor")
    library.impl("sgmv_shrink", shrink, "PrivateUse1")
    library.impl("sgmv_expand", expand, "PrivateUse1")
    return library


def require(condition: bool, what: str) -> None:
    if not condition:
        raise RuntimeError(f"beyond the kernel's limits: {what}")


def there(x: torch.Tensor, block: int = 32) -> torch.Tensor:
    """What lies at the address, on the host. ``block``: bytes of which the address is a multiple."""
    require(x.data_ptr() % block == 0, f"an address of {x.data_ptr() % block} bytes into a block")
    steps, step = [], 1
    for size in reversed(x.shape):
        steps.append(step)
        step *= size
    return x.as_strided(x.shape, steps[::-1], x.storage_offset()).cpu()


def runs(x: torch.Tensor, indices: torch.Tensor, lengths: torch.Tensor, adapters: int) -> list[tuple[int, int, int]]:
    """First row, end and adapter of each run that has one."""
    require(indices.dtype == lengths.dtype == torch.int64, "indices of another type than int64")
    found, at = [], 0
    for index, length in zip(there(indices, 8).tolist(), there(lengths, 8).tolist(), strict=True):
        require(index < adapters, f"adapter {index} of {adapters}")
        if index >= 0:
            found.append((at, at + length, index))
        at += length
    require(at <= x.shape[0], f"runs of {at} rows, {x.shape[0]} there are")
    return found


def shrink(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_indices: torch.Tensor,
    seq_len: torch.Tensor,
    y: torch.Tensor,
    scale: float,
) -> None:
    CALLS["shrink"] += 1
    require(x.dtype in (torch.float16, torch.bfloat16) and weight.dtype == x.dtype, f"types {x.dtype}, {weight.dtype}")
    require(y.dtype == torch.float32 and x.dim() == y.dim() == 2 and weight.dim() == 3, "shapes and types")
    require(x.shape[1] > y.shape[1], "hidden in should be greater than hidden out")
    require(x.shape[1] % 16 == 0 and y.shape[1] in RANKS, f"k {x.shape[1]}, rank {y.shape[1]}")
    require(weight.shape[1:] == (y.shape[1], x.shape[1]), "the weight's shape")
    rows, matrices, result = there(x).double(), there(weight).double(), there(y)
    for begin, end, index in runs(x, lora_indices, seq_len, len(weight)):
        result[begin:end] = (scale * (rows[begin:end] @ matrices[index].t())).float()
    y.copy_(result)


def expand(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_indices: torch.Tensor,
    seq_len: torch.Tensor,
    y: torch.Tensor,
    slice_offset: int,
    slice_size: int,
) -> torch.Tensor:
    CALLS["expand"] += 1
    require(y.dtype in (torch.float16, torch.bfloat16) and weight.dtype == y.dtype, f"types {y.dtype}, {weight.dtype}")
    require(x.dtype == torch.float32 and x.dim() == y.dim() == 2 and weight.dim() == 3, "shapes and types")
    require(x.shape[1] <= slice_size, "hidden in should be smaller than hidden out")
    require(x.shape[1] in RANKS and weight.shape[1:] == (slice_size, x.shape[1]), "the weight's shape")
    require(not (slice_size % 16 or slice_offset % 16 or y.shape[1] % 16), "a block that another begins in")
    require(slice_offset >= 0 and slice_offset + slice_size <= y.shape[1], "the slice")
    rows, matrices, result = there(x).double(), there(weight).double(), there(y)
    columns = slice(slice_offset, slice_offset + slice_size)
    for begin, end, index in runs(x, lora_indices, seq_len, len(weight)):
        total = result[begin:end, columns].double() + rows[begin:end] @ matrices[index].t()
        result[begin:end, columns] = total.to(y.dtype)
    # What it writes lies densely as well, whatever the strides of the tensor are.
    y.as_strided(y.shape, (y.shape[1], 1), y.storage_offset()).copy_(result)
    return y
