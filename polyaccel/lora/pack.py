"""An adapter as one contiguous host buffer for one rank: one copy to the device, no work a tensor there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from polyaccel.backend.adapter_store import PackedAdapter, PackedEntry
from polyaccel.backend.errors import AdapterIncompatible, ConfigurationError
from polyaccel.lora.adapter_file import DTYPES, LoraPair
from polyaccel.lora.target import AdapterTarget
from polyaccel.lora.values import bits_of, largest_magnitude

ALIGNMENT = 64
# Torch spreads elementwise work from 32,768 elements on over threads; entering hundreds of parallel regions costs far
# more than it saves (seconds where the cores are contended).
_TILE = 32_768


def pack_adapter(
    matched: Sequence[tuple[AdapterTarget, LoraPair]],
    *,
    dtype: torch.dtype,
    staging: torch.Tensor | None = None,
) -> PackedAdapter:
    """Cut each pair to this rank's rows and columns and lay the shards out one after the other.

    A is copied as it is; B is multiplied by the scale of its true rank in float32 and rounded once to ``dtype``. Rows
    and columns that only pad a slice are zero. Shards start at multiples of 64 bytes and gaps are zero, so that equal
    adapters give equal buffers. Modules of which this rank holds nothing get no entry.

    Args:
        dtype: of the buffer; float32, float16 or bfloat16.
        staging: a 1-D CPU buffer of ``dtype`` or uint8 that is used, and overwritten, when large enough; the result is
            then a view of it.

    Raises:
        AdapterIncompatible: a value that is not finite, or leaves the range of ``dtype`` after scaling.
        ConfigurationError: another dtype.
    """
    if dtype not in DTYPES:
        raise ConfigurationError(f"adapters cannot be packed as {dtype}; float32, float16 and bfloat16 are supported")
    local = [(target, pair) for target, pair in matched if target.is_local]
    entries, size = _layout(local, dtype.itemsize)
    buffer = _buffer(size, dtype, staging)
    scratch = torch.empty(_TILE, dtype=torch.float32)
    end = 0
    for (target, pair), entry in zip(local, entries, strict=True):
        _clear(buffer, end, entry.a_offset)
        a, a_room = target.in_cols.take(pair.a, 1), _matrix(buffer, entry.a_offset, entry.a_shape)
        _convert(a, a_room[:, : a.shape[1]], 1.0, scratch)
        if a.shape[1] < a_room.shape[1]:
            a_room[:, a.shape[1] :].zero_()
        _clear(buffer, entry.a_offset + a_room.numel(), entry.b_offset)
        b, b_room = target.out_rows.take(pair.b, 0), _matrix(buffer, entry.b_offset, entry.b_shape)
        _convert(b, b_room[: b.shape[0]], pair.numbers.scale, scratch)
        end = entry.b_offset + b_room.numel()
        _clear(buffer, entry.b_offset + b.numel(), end)
    _clear(buffer, end, size)
    packed = PackedAdapter(
        buffer=buffer, entries=tuple(entries), max_rank=max((entry.rank for entry in entries), default=0)
    )
    if largest_magnitude(buffer) == float("inf"):
        raise AdapterIncompatible(_not_finite(packed, local, dtype))
    return packed


def _layout(local: Sequence[tuple[AdapterTarget, LoraPair]], itemsize: int) -> tuple[list[PackedEntry], int]:
    step = ALIGNMENT // itemsize
    entries: list[PackedEntry] = []
    offset = 0
    for target, pair in local:
        rank = pair.numbers.true_rank
        a_shape = (rank, target.a_width)
        b_shape = (target.b_height, rank)
        a_offset = offset
        b_offset = a_offset + -(-a_shape[0] * a_shape[1] // step) * step
        offset = b_offset + -(-b_shape[0] * b_shape[1] // step) * step
        entries.append(
            PackedEntry(
                site=target.site,
                slice=target.slice,
                expert=target.expert,
                kind=target.kind,
                rank=rank,
                a_offset=a_offset,
                a_shape=a_shape,
                b_offset=b_offset,
                b_shape=b_shape,
            )
        )
    return entries, offset


def _buffer(size: int, dtype: torch.dtype, staging: torch.Tensor | None) -> torch.Tensor:
    if staging is not None and staging.dim() == 1 and staging.is_contiguous() and staging.device.type == "cpu":
        if staging.dtype == dtype and staging.numel() >= size:
            return staging[:size]
        if staging.dtype == torch.uint8 and staging.numel() >= size * dtype.itemsize:
            return staging[: size * dtype.itemsize].view(dtype)
    return torch.empty(size, dtype=dtype)


def _clear(buffer: torch.Tensor, start: int, stop: int) -> None:
    if stop > start:
        buffer[start:stop].zero_()


def _matrix(buffer: torch.Tensor, offset: int, shape: tuple[int, int]) -> torch.Tensor:
    return buffer[offset : offset + shape[0] * shape[1]].view(shape)


def _convert(source: torch.Tensor, out: torch.Tensor, scale: float, scratch: torch.Tensor) -> None:
    """``out = round(float32(source) * scale)``, in tiles that stay on one thread and in the cache."""
    if scale == 1.0 and source.dtype == out.dtype:
        np.copyto(bits_of(out), bits_of(source))
        return
    rows, cols = source.shape
    width = min(cols, _TILE - 1)
    height = max((_TILE - 1) // width, 1)
    for top in range(0, rows, height):
        for left in range(0, cols, width):
            part = source[top : top + height, left : left + width]
            into = out[top : top + height, left : left + width]
            if scale == 1.0:
                into.copy_(part)
                continue
            product = scratch[: part.numel()].view(part.shape)
            product.copy_(part).mul_(scale)
            into.copy_(product)


def _not_finite(packed: PackedAdapter, local: Sequence[tuple[AdapterTarget, LoraPair]], dtype: torch.dtype) -> str:
    for (target, pair), entry in zip(local, packed.entries, strict=True):
        for matrix, view in (("A", packed.a(entry)), ("B", packed.b(entry))):
            if largest_magnitude(view) == float("inf"):
                return (
                    f"module {target.module!r}: {matrix} is not finite in {dtype} (scale {pair.numbers.scale:g}); "
                    "load the model in a wider dtype or correct the adapter"
                )
    return f"a value is not finite in {dtype}"
