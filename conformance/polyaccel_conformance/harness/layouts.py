"""Layouts of tensor arguments: the same values at other strides and offsets of a larger buffer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from polyaccel.backend import Argument, Layout

CONTIGUOUS = "contiguous"
ROW_PADDED = "row_padded"
OFFSET = "offset"
TRANSPOSED = "transposed"
STEPPED = "stepped"
EXPANDED = "expanded"

LAYOUTS: dict[Layout, tuple[str, ...]] = {
    Layout.CONTIGUOUS: (CONTIGUOUS, OFFSET),
    Layout.ROWS: (CONTIGUOUS, ROW_PADDED, OFFSET),
    Layout.STRIDED: (CONTIGUOUS, ROW_PADDED, OFFSET, TRANSPOSED, STEPPED, EXPANDED),
}
"""Names of the layouts that an argument's spec promises to accept."""


def accepted(argument: Argument, dimensions: int = 2) -> tuple[str, ...]:
    """The names for an argument of so many dimensions; one without rows has no padded ones."""
    names = dict.fromkeys(name for layout in argument.layouts for name in LAYOUTS[layout])
    return tuple(name for name in names if dimensions > 1 or name not in (ROW_PADDED, TRANSPOSED))


def promised(argument: Argument, layout: str) -> bool:
    """Whether the contract makes implementations accept an argument in this layout."""
    return any(layout in LAYOUTS[known] for known in argument.layouts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a tensor lies in a 1-D buffer, in elements: ``offset``, ``strides``, and the elements that it ``spans``."""

    offset: int
    strides: tuple[int, ...]
    span: int


def place(shape: Sequence[int], layout: str, lead: int) -> Place:
    """Strides for a layout, with ``lead`` elements in front (one more for ``offset``: misaligned).

    ``expanded`` repeats one row: only for values that are equal along dimension 0.
    """
    shape = tuple(shape)
    if layout == TRANSPOSED and len(shape) >= 2:
        swapped = (*shape[:-2], shape[-1], shape[-2])
        strides = list(_dense(swapped))
        strides[-1], strides[-2] = strides[-2], strides[-1]
    elif layout == ROW_PADDED and len(shape) >= 2:
        strides = list(_dense((*shape[:-1], shape[-1] + 3)))
    elif layout == STEPPED and shape:
        strides = [2 * s for s in _dense(shape)]
    elif layout == EXPANDED and shape:
        strides = [0, *_dense(shape[1:])]
    else:
        strides = list(_dense(shape))
    offset = lead + (1 if layout == OFFSET else 0)
    reach = sum((n - 1) * s for n, s in zip(shape, strides, strict=True) if n > 0) + 1 if all(shape) else 0
    return Place(offset=offset, strides=tuple(strides), span=offset + reach)


def _dense(shape: Sequence[int]) -> tuple[int, ...]:
    strides: list[int] = []
    size = 1
    for n in reversed(shape):
        strides.append(size)
        size *= max(n, 1)
    return tuple(reversed(strides))
