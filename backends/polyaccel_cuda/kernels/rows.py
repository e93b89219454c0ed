"""The adapters of a step's rows, in device memory, as kernels take them: by tile of rows, one segment a slot."""

from __future__ import annotations

from typing import NamedTuple

import torch


class TileAdapters(NamedTuple):
    """Segments by tile of ``rows`` rows: tile t has ``starts[t]:starts[t + 1]``.

    Attributes:
        b: ``[rank rows, n]`` of one site, dense, slices side by side.
        rows: rows of a tile.
        starts: ``[tiles + 1]`` int32.
        first, rank: ``[segments]`` int32, the slot's first rank row and how many there are.
        mix: ``[segments, rows]`` float32, 0 for rows of other segments.
    """

    b: torch.Tensor
    rows: int
    starts: torch.Tensor
    first: torch.Tensor
    rank: torch.Tensor
    mix: torch.Tensor


Pointers = tuple[torch.Tensor, int, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def pointers(h: torch.Tensor, adapters: TileAdapters) -> Pointers:
    """``h``, its row stride and the tables, as kernels take them."""
    return h, h.stride(0), adapters.b, adapters.starts, adapters.first, adapters.rank, adapters.mix
