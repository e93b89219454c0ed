"""Writing keys and values into a paged cache: aclnnScatterPaKvCache.

"Scatter" below: Ascend/op-plugin docs/zh/custom_APIs/torch_npu/torch_npu-npu_scatter_pa_kv_cache.md. Order of the C
arguments: op_plugin/ops/opapi/ScatterPaKvCacheNpuOpApi.cpp. Simulated: the plain scene (3-D keys) in both layouts.
"""

from __future__ import annotations

import torch

from .descriptor import (
    FLOATS,
    INDICES,
    Tensor,
    require,
    require_contiguous,
    require_dtype,
    require_rank,
    require_same_dtype,
)
from .environment import CHIP_310P, Environment
from .operator import Compute, aclnn
from .refusal import NotSimulated, inner, invalid

SCATTER = "Ascend/op-plugin docs/zh/custom_APIs/torch_npu/torch_npu-npu_scatter_pa_kv_cache.md"

_TYPES = (*FLOATS, torch.int8, torch.uint8, torch.int16, torch.int32)
_NZ_BYTES = 32  # the innermost axis of an NZ cache holds 32 bytes: 16 halves or 32 bytes


def _check_caches(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, nz: bool) -> None:
    """Scatter, example: Norm [blocks, block_size, heads, width]; PA_NZ [blocks, heads * width / c, block_size, c]."""
    for name, source, cache in (("key", key, key_cache), ("value", value, value_cache)):
        heads, width = source.shape[1:]
        if not nz:
            if cache.shape[2:] != (heads, width):
                raise invalid(
                    f"{name}Cache {list(cache.shape)} must end in the heads and width of {name}: {[heads, width]}."
                )
            continue
        inside = _NZ_BYTES // source.dtype.itemsize
        if heads * width % inside or cache.shape[1] * inside != heads * width or cache.shape[3] != inside:
            raise invalid(
                f"{name}Cache {list(cache.shape)} must be [blocks, {heads * width // inside}, block_size, {inside}] "
                f"in PA_NZ for {name} {list(source.shape)}."
            )


def _write(source: Tensor, cache: Tensor, slots: torch.Tensor, nz: bool) -> None:
    target, rows = cache.view(), source.view()
    block = cache.shape[2] if nz else cache.shape[1]
    where = slots // block, slots % block
    if nz:
        target.permute(0, 2, 1, 3)[where] = rows.reshape(rows.shape[0], cache.shape[1], cache.shape[3])
    else:
        target[where] = rows


@aclnn(
    "aclnnScatterPaKvCache",
    "8*tensor 2*string 2*ints",
    serves="npu_scatter_pa_kv_cache",
    document=SCATTER,
    since="8.1.RC1",
)
def scatter_pa_kv_cache(
    environment: Environment,
    key: Tensor,
    key_cache: Tensor,
    slots: Tensor,
    value: Tensor,
    value_cache: Tensor,
    compress_lens: Tensor | None,
    compress_seq_offsets: Tensor | None,
    seq_lens: Tensor | None,
    cache_mode: str | None,
    scatter_mode: str | None,
    strides: tuple[int, ...] | None,
    offsets: tuple[int, ...] | None,
) -> Compute:
    """cache[slot // block_size][slot % block_size] = row, for every token. key, value: [tokens, heads, width]."""
    if environment.chip == CHIP_310P:
        raise invalid(f"aclnnScatterPaKvCache is not supported on this chip: {environment.chip}.")  # Scatter, products
    require(key=key, keyCache=key_cache, slotMapping=slots, value=value, valueCache=value_cache)
    # Scatter, parameters and constraints.
    require_dtype("key", key, _TYPES)
    require_same_dtype(key=key, value=value, keyCache=key_cache, valueCache=value_cache)
    require_dtype("slotMapping", slots, INDICES)
    if cache_mode not in (None, "", "Norm", "PA_NZ"):
        raise invalid(f"cacheMode must be Norm or PA_NZ, but is {cache_mode!r}.")
    if len(key.shape) == 4 or any(x is not None for x in (compress_lens, compress_seq_offsets, seq_lens)):
        raise NotSimulated("aclnnScatterPaKvCache", "compression (4-D keys, compress_lens, seq_lens)")
    require_contiguous(key=key, value=value, keyCache=key_cache, valueCache=value_cache, slotMapping=slots)
    for name, tensor in (("key", key), ("value", value)):
        require_rank(name, tensor, 3, 3)
    for name, tensor in (("keyCache", key_cache), ("valueCache", value_cache)):
        require_rank(name, tensor, 4, 4)
    require_rank("slotMapping", slots, 1, 1)
    if key.shape[:2] != value.shape[:2]:
        raise invalid(f"key {list(key.shape)} and value {list(value.shape)} must agree in their first two axes.")
    if slots.shape[0] != key.shape[0]:
        raise invalid(f"slotMapping must have one value for each of the {key.shape[0]} tokens: {list(slots.shape)}.")
    nz = cache_mode == "PA_NZ"
    _check_caches(key, value, key_cache, value_cache, nz)
    blocks, block = key_cache.shape[0], key_cache.shape[2 if nz else 1]
    if (value_cache.shape[0], value_cache.shape[2 if nz else 1]) != (blocks, block):
        raise invalid(
            f"keyCache {list(key_cache.shape)} and valueCache {list(value_cache.shape)} must have equal blocks."
        )

    def compute() -> None:
        where = slots.view().to(torch.int64)
        if where.numel() and (int(where.min()) < 0 or int(where.max()) >= blocks * block):
            raise inner(f"slotMapping must lie in [0, {blocks * block - 1}], but is {where.tolist()}.")
        if len(set(where.tolist())) != where.numel():
            # Scatter, constraints: "no two equal values; with equal ones correctness is not guaranteed".
            raise inner(f"slotMapping must not repeat a value, but is {where.tolist()}.")
        _write(key, key_cache, where, nz)
        _write(value, value_cache, where, nz)

    return compute


OPERATORS = (scatter_pa_kv_cache,)
