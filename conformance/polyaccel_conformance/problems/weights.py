"""Weights of a problem: host values, and how they get into a backend's Weight."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from polyaccel.backend import Slice, Weight, WeightSpec
from polyaccel_conformance.bench import SITE, Bench
from polyaccel_conformance.formats import FORMATS
from polyaccel_conformance.operand import Operand


@dataclass(frozen=True, slots=True, kw_only=True)
class FloatWeight:
    """A float weight: ``matrix: [n, k]`` of all slices, ``bias: [n]`` or None, rows of each slice."""

    matrix: Operand
    bias: Operand | None
    slices: tuple[int, ...]
    rank_rows: int = 0

    def place(self, bench: Bench, site: str = SITE) -> Weight:
        """Allocated, written slice by slice and sealed."""
        spec = WeightSpec(
            site=site,
            slices=tuple(Slice(name=f"s{i}", n=n) for i, n in enumerate(self.slices)),
            k=self.matrix.shape[1],
            dtype=FORMATS[self.matrix.dtype].torch,
            bias=self.bias is not None,
            rank_rows=self.rank_rows,
        )
        weight = bench.backend.allocate_weight(spec, bench.device)
        matrix = self.matrix.torch()
        bias = None if self.bias is None else self.bias.torch()
        for i, (begin, n) in enumerate(zip(spec.starts, self.slices, strict=False)):
            if n:
                weight.write(i, matrix[begin : begin + n])
                if bias is not None:
                    weight.write_bias(i, bias[begin : begin + n])
        weight.seal()
        return weight


def split_rows(n: int, pattern: str) -> tuple[int, ...]:
    """Rows of each slice: ``one``, ``pair`` (halves), ``qkv`` (about 4 : 1 : 1), ``narrow`` (all but one, one)."""
    if pattern == "one" or n < 3:
        return (n,)
    if pattern == "pair":
        return (n // 2, n - n // 2)
    if pattern == "qkv":
        small = max(n // 6, 1)
        return (n - 2 * small, small, small)
    return (n - 1, 1)


def widths(slices: Sequence[int]) -> list[tuple[int, int]]:
    """Begin and end of each slice's columns of y."""
    ends = np.cumsum([0, *slices])
    return [(int(a), int(b)) for a, b in itertools.pairwise(ends)]


def tensor_of(value: object) -> torch.Tensor:
    """The result of an operator that returns one tensor."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"expected a tensor, got {type(value).__name__}")
    return value
