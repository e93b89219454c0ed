"""Weights of a problem: host values, and how they get into a backend's Weight."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from polyaccel.backend import Quantisation, Slice, Weight, WeightSpec
from polyaccel.backend.support import Static
from polyaccel_conformance.bench import SITE, Bench
from polyaccel_conformance.formats import FORMATS, format_of
from polyaccel_conformance.operand import Operand
from polyaccel_conformance.oracle.quantised import dequantize
from polyaccel_conformance.words import Source

SLICES = ("one", "pair", "qkv", "narrow")
"""How output rows are split: one; halves; about 4 : 1 : 1; all but one, and one."""

FORMS = ("float", "int4", "int8", "int4/g16", "int4/g6", "int8/g7")
"""How a weight is stored: float, or quantised with a group size (128 where none is named)."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Quantised:
    """The canonical form: ``codes: [n, k]``, ``zeros: [n, groups]`` uint8, ``scales: [n, groups]``."""

    bits: int
    group_size: int
    codes: Operand
    zeros: Operand
    scales: Operand

    @property
    def spec(self) -> Quantisation:
        scale_dtype = FORMATS[self.scales.dtype].torch
        return Quantisation(bits=self.bits, group_size=self.group_size, scale_dtype=scale_dtype)

    def values(self, dtype: str) -> Operand:
        """The dequantised matrix ``[n, k]``."""
        codes, zeros = self.codes.values.astype(np.int64), self.zeros.values.astype(np.int64)
        scales = self.scales.values.astype(np.float64)
        return Operand(dequantize(codes, zeros, scales, self.group_size, format_of(dtype)), dtype)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HostWeight:
    """A weight as a whole, or one rank's part of it.

    Attributes:
        matrix: ``[n, k]`` of all slices; what a quantised weight dequantises to.
        bias: ``[n]`` or None.
        slices: rows of each slice.
        quantised: the form that is written instead of the matrix.
        lookup: an embedding table.
    """

    matrix: Operand
    slices: tuple[int, ...]
    bias: Operand | None = None
    quantised: Quantised | None = None
    lookup: bool = False
    pieces: int = 1

    @property
    def k(self) -> int:
        return self.matrix.shape[1]

    @property
    def starts(self) -> tuple[int, ...]:
        """First column of y of each slice, and the end."""
        return tuple(int(x) for x in np.cumsum([0, *self.slices]))

    def place(self, bench: Bench, site: str = SITE, *, rank_rows: int = 0) -> Weight:
        """Allocated, written slice by slice (and in several pieces where ``pieces`` says so) and sealed."""
        spec = WeightSpec(
            site=site,
            slices=tuple(Slice(name=f"s{i}", n=n) for i, n in enumerate(self.slices)),
            k=self.k,
            dtype=FORMATS[self.matrix.dtype].torch,
            bias=self.bias is not None,
            quantisation=None if self.quantised is None else self.quantised.spec,
            rank_rows=rank_rows,
            lookup=self.lookup,
        )
        weight = bench.backend.allocate_weight(spec, bench.device)
        bias = None if self.bias is None else self.bias.torch()
        write = self._float() if self.quantised is None else self._codes(self.quantised)
        for i, (begin, end) in enumerate(itertools.pairwise(self.starts)):
            if end == begin:
                continue
            write(weight, i, begin, end)
            if bias is not None:
                weight.write_bias(i, bias[begin:end])
        weight.seal()
        return weight

    def _float(self) -> Callable[[Weight, int, int, int], None]:
        """What writes rows ``begin:end`` of the matrix into a slice."""
        matrix = self.matrix.torch()

        def write(weight: Weight, index: int, begin: int, end: int) -> None:
            rows = matrix[begin:end]
            for row, last in _pieces(rows.shape[0], self.pieces):
                for col, stop in _pieces(rows.shape[1], self.pieces):
                    weight.write(index, rows[row:last, col:stop], row=row, col=col)

        return write

    def _codes(self, form: Quantised) -> Callable[[Weight, int, int, int], None]:
        """The same for the canonical form."""
        parts = [part.torch() for part in (form.codes, form.zeros, form.scales)]
        size, k = form.group_size, self.k
        cut = size * (form.spec.groups(k) // 2) if self.pieces > 1 else 0

        def write(weight: Weight, index: int, begin: int, end: int) -> None:
            codes, zeros, scales = (part[begin:end] for part in parts)
            for col, stop in ((0, cut), (cut, k)):
                if stop > col:
                    groups = slice(col // size, col // size + form.spec.groups(stop - col))
                    weight.write_quantised(index, codes[:, col:stop], zeros[:, groups], scales[:, groups], col=col)

        return write

    def static(self, *, largest_rank: int = 0, world_size: int = 1) -> Mapping[str, Static]:
        """What a query says about it."""
        return {
            "dtype": self.matrix.dtype,
            "k": self.k,
            "hidden": self.k,
            "slices": self.slices,
            "bias": self.bias is not None,
            "world_size": world_size,
            "quantised": self.quantised is not None,
            "group_size": 0 if self.quantised is None else self.quantised.group_size,
            "largest_rank": largest_rank,
        }

    def digests(self, name: str = "weight") -> dict[str, str]:
        found = {name: self.matrix.digest()}
        if self.bias is not None:
            found[f"{name}.bias"] = self.bias.digest()
        if self.quantised is not None:
            form = self.quantised
            found |= {f"{name}.{part}": getattr(form, part).digest() for part in ("codes", "zeros", "scales")}
        return found

    # -- one rank's part ---------------------------------------------------------------------------------------------

    def output_rows(self, cuts: Sequence[tuple[int, int]]) -> HostWeight:
        """Rows ``begin:end`` of each slice: column parallel, the bias is cut alike. Float weights only."""
        rows = np.concatenate(
            [np.arange(start + a, start + b) for start, (a, b) in zip(self.starts[:-1], cuts, strict=True)]
        ).astype(np.int64)
        bias = None if self.bias is None else Operand(self.bias.values[rows], self.bias.dtype)
        return replace(
            self,
            matrix=Operand(self.matrix.values[rows], self.matrix.dtype),
            bias=bias,
            slices=tuple(b - a for a, b in cuts),
        )

    def input_columns(self, begin: int, end: int, *, bias: bool) -> HostWeight:
        """Columns ``begin:end``: row parallel; only the rank with ``bias`` keeps that. Float weights only."""
        matrix = Operand(self.matrix.values[:, begin:end], self.matrix.dtype)
        return replace(self, matrix=matrix, bias=self.bias if bias else None)


def quantised_weight(
    source: Source,
    dtype: str,
    form: str,
    n: int,
    k: int,
    *,
    scale_dtype: str = "float16",
    exact: bool = False,
    positive: bool = False,
) -> Quantised:
    """Random codes of all values and zeros; scales are 1 where ``exact``, else in ``[1, 2) / 2^bits``.

    Args:
        form: one of :data:`FORMS` but ``float``.
        positive: zeros are 0.
    """
    bits, size = parse_form(form)
    top = 2**bits - 1
    groups = -(-k // size)
    codes = source.integers("codes", (n, k), 0, top)
    zeros = source.integers("zeros", (n, groups), 0, 0 if positive else top)
    scales = np.ones((n, groups)) if exact else (1 + source.uniform("scales", (n, groups))) / (top + 1)
    return Quantised(
        bits=bits,
        group_size=size,
        codes=Operand(codes, "uint8"),
        zeros=Operand(zeros, "uint8"),
        scales=Operand.rounded(scales, scale_dtype),
    )


def parse_form(form: str) -> tuple[int, int]:
    """Bits and group size of a quantised form."""
    width, _, group = form.partition("/g")
    return int(width.removeprefix("int")), int(group or 128)


def split_rows(n: int, pattern: str) -> tuple[int, ...]:
    """Rows of each slice, by one of :data:`SLICES`."""
    if pattern == "one" or n < 3:
        return (n,)
    if pattern == "pair":
        return (n // 2, n - n // 2)
    if pattern == "qkv":
        small = max(n // 6, 1)
        return (n - 2 * small, small, small)
    return (n - 1, 1)


def shares(n: int, world_size: int) -> list[tuple[int, int]]:
    """Begin and end of each rank's part of n, the first ones larger where n does not divide."""
    sizes = [n // world_size + (rank < n % world_size) for rank in range(world_size)]
    ends = np.cumsum([0, *sizes])
    return [(int(a), int(b)) for a, b in itertools.pairwise(ends)]


def tensor_of(value: object) -> torch.Tensor:
    """The result of an operator that returns one tensor."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"expected a tensor, got {type(value).__name__}")
    return value


def _pieces(n: int, count: int) -> list[tuple[int, int]]:
    """``0:n`` in at most ``count`` uneven pieces."""
    if count == 1 or n < 2:
        return [(0, n)]
    first = max(n // 3, 1)
    return [(0, first), (first, n)]
