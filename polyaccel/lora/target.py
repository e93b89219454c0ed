"""What of a model an adapter can touch, as the model's builder declares it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from polyaccel.backend.errors import ConfigurationError
from polyaccel.parallel.cut import Rows

Kind = Literal["linear", "embedding"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterTarget:
    """One slice of one site that takes adapters, seen from one rank.

    ``module`` is the checkpoint's module name ("model.layers.0.self_attn.q_proj"), ``site`` and ``slice`` are where
    its delta is added ("layers.0.qkv", 0). Several targets may name one module that the checkpoint stores fused;
    their ``out_rows`` then lie in that module's rows. ``in_features`` and ``out_features`` are the whole module's,
    before any cut; for an embedding ``in_features`` is the vocabulary and ``in_cols`` the vocabulary rows of this
    rank. ``out_rows`` and ``in_cols`` are what this rank holds; either may be empty, and then the rank holds no part
    of the adapter here. ``padded_rows`` and ``padded_cols`` are the sizes of the slice itself where it is padded with
    zeros beyond them (0: it is not).

    Raises:
        ConfigurationError: rows or columns beyond the module, or more of them than the slice has.
    """

    module: str
    site: str
    slice: int
    expert: int | None = None
    kind: Kind = "linear"
    in_features: int
    out_features: int
    out_rows: Rows
    in_cols: Rows
    layer: int | None = None
    padded_rows: int = 0
    padded_cols: int = 0

    def __post_init__(self) -> None:
        if self.out_rows.end > self.out_features or self.in_cols.end > self.in_features:
            raise ConfigurationError(
                f"target {self.module!r} holds rows up to {self.out_rows.end} and columns up to {self.in_cols.end} of "
                f"a module of {self.out_features} x {self.in_features}"
            )
        if 0 < self.padded_rows < self.out_rows.size or 0 < self.padded_cols < self.in_cols.size:
            raise ConfigurationError(
                f"target {self.module!r} holds {self.out_rows.size} rows and {self.in_cols.size} columns of a slice of "
                f"{self.padded_rows} x {self.padded_cols}"
            )

    @property
    def a_width(self) -> int:
        """Columns of A as the site takes it."""
        return self.padded_cols or self.in_cols.size

    @property
    def b_height(self) -> int:
        """Rows of B as the site takes it."""
        return self.padded_rows or self.out_rows.size

    @property
    def is_local(self) -> bool:
        """Whether this rank holds any part of the module."""
        return self.out_rows.size > 0 and self.in_cols.size > 0
