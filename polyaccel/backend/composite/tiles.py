"""16-bit products on the CPU that keep rows apart.

oneDNN's kernels for AMX read a row's last, partly filled tile to its end, which is the beginning of the next row, and
rely on zeros in the other operand: a NaN or an infinity there reaches the row before (oneDNN issue 5717, seen with the
one that torch 2.13 brings; fixed upstream after 3.14). Operands that fill their tiles are not affected.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

ROWS = 16
"""Rows of a tile. The last tile of rows is read with care, so that no product of so few rows is affected."""

DEPTH = 32
"""16-bit elements of a tile's row; they are multiplied in pairs."""


def ragged(dtype: torch.dtype, k: int) -> bool:
    """Whether rows of ``k`` elements end in the middle of a tile's row, and one may be read beyond its end."""
    return dtype.itemsize == 2 and (k % DEPTH != 0 if k > DEPTH else k % 2 != 0)


def whole_tiles(a: torch.Tensor, b: torch.Tensor, *, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The operands of ``a @ b`` themselves, or copies filled up with zeros where a row could reach its neighbour.

    Args:
        a: ``[..., rows, k]``, of any strides.
        b: the other matrix; ``axis`` (-1 or -2) is the one of k.
    """
    k = a.shape[-1]
    if a.shape[-2] <= ROWS or not ragged(a.dtype, k) or a.device.type != "cpu":
        return a, b
    more = -k % DEPTH
    return pad(a, (0, more)), pad(b, (0, more) if axis == -1 else (0, 0, 0, more))
