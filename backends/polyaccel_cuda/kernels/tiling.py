"""How prefill's kernels cut their work, and what a step's adapters cost as part of the base product or apart from it.

Measured on an H100 unless marked; see docs/cuda.md.
"""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """What a program of the activation and of the expand takes.

    Attributes:
        rows: at most those of a unit, a divisor of them, at least 16.
        columns: of each half or slice.
        warps, stages: as Triton takes them.
        across: neighbours in launch order are neighbours in a row, not in a column: rows are read in long runs, and B
            comes from the L2 cache, where all of a prefill's adapters fit.
        woven: rank rows of all slices are read together, as they lie, and multiplied with B's rows between rows of
            zeros: twice the arithmetic of next to nothing for half the reads.
    """

    rows: int
    columns: int
    warps: int
    stages: int = 1
    across: bool = True
    woven: bool = True


class Share(NamedTuple):
    """What a program of the shrink takes.

    Attributes:
        rows, columns, k: of its product's tiles.
        programs: k is split until there are so many, so that every multiprocessor has work.
        most: splits at most; 1 leaves out the launch that sums them.
    """

    rows: int
    columns: int
    k: int
    warps: int
    stages: int
    programs: int = 264
    most: int = 8


ACTIVATION = Tile(rows=64, columns=64, warps=4)
EXPAND = Tile(rows=64, columns=64, warps=4, woven=False)
SHRINK = Share(rows=64, columns=64, k=128, warps=4, stages=3)
INVARIANT_SHRINK = SHRINK._replace(most=1)
"""Of ``batch_invariant``: k is never split."""
# Products of float32 use plain cores: the tiles must fit the registers.
WIDE_COLUMNS = 32

FOLDED_RANK_ROWS = 0
"""Up to so many rank rows a prefill's base product covers them; beyond, each row meets those of its own adapters alone.

For T rows the product takes 2 T k FLOPs more for each rank row of each slice; the segmented kernel reads x once more
and takes one or two launches. By bytes and FLOPs they are equal at some 100 rank rows. Measured (2,048 tokens, rank 16,
us a layer added by adapters), the product is no slower with 16 rank rows, but what reads its wide rows is: 167 folded
and 145 segmented in one segment, 138 and 142 in 8, 290 and 158 in 32.
"""

QKV_EXPANDS_APART = False
"""Whether a prefill's q, k and v get their adapters from the expand's tiles and are then rotated like any, or from the
rotation."""


def rank_block(largest: int) -> int:
    """Rank rows that a tile takes at once where the largest rank is known: all of them up to 64."""
    return 16 if largest <= 16 else 32 if largest <= 32 else 64
