"""A weight and the adapters' A rows under it, one matrix: one product gives y and the rank rows of every slot."""

from __future__ import annotations

import torch

from polyaccel.backend import Device, OperatorError, Weight, WeightSpec
from polyaccel.backend.composite.weight import TensorWeight

ROW_MULTIPLE = 8
"""Rows before the rank rows, and rank rows that a product covers, are multiples of this: cuBLAS reads vectors."""


def up(n: int, multiple: int = ROW_MULTIPLE) -> int:
    return -(-n // multiple) * multiple


class FoldedWeight(TensorWeight):
    """``[n_padded + rank_rows * slices, k]`` row-major, zero where nothing was written.

    Rank row r of slice s is row ``n_padded + r * slices + s``, so that a prefix holds the first rank rows of all
    slices. A tied weight shares the base rows of another and has its rank rows apart.
    """

    def __init__(self, spec: WeightSpec, device: Device, tied: Weight | None = None) -> None:
        self.n_padded = up(spec.n)
        self._rank_height = up(spec.rank_rows * len(spec.slices))
        # Filled by _storage, which a tied weight does not call.
        self._whole: torch.Tensor | None = None
        super().__init__(spec, device, tied)
        whole = self.whole
        with device.scope():
            self._rank_matrix: torch.Tensor = (
                device.zeros((self._rank_height, spec.k), spec.dtype) if whole is None else whole[self.n_padded :]
            )
            self._wide_bias = device.zeros((self.n_padded + self._rank_height,), spec.dtype) if spec.bias else None

    @property
    def whole(self) -> torch.Tensor | None:
        """Base and rank rows as one matrix; None where they are apart."""
        return self._whole

    @property
    def folded(self) -> bool:
        """Whether one product can cover base and rank rows."""
        return self._whole is not None

    def seal(self) -> None:
        if self._wide_bias is not None and self.bias is not None:
            self._wide_bias[: self.spec.n].copy_(self.bias)
        super().seal()

    def covering(self, rank_rows: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The matrix whose product holds y and, from column ``n_padded``, the first ``rank_rows`` rank rows of each
        slice; and its bias.

        Raises:
            OperatorError: rank rows are apart from the base.
        """
        if self._whole is None:
            raise OperatorError("linear", f"the rank rows of {self.spec.site!r} are not under its base")
        height = self.n_padded + up(rank_rows * len(self.spec.slices))
        return self._whole[:height], None if self._wide_bias is None else self._wide_bias[:height]

    def rank_matrix(self, rank_rows: int) -> torch.Tensor:
        """``[at least rank_rows * slices, k]``: the first rank rows alone."""
        return self._rank_matrix[: up(rank_rows * len(self.spec.slices))]

    def a_rows(self, slice_index: int, first: int, rows: int) -> torch.Tensor:
        """View ``[rows, k]``: rank rows of a slice."""
        slices = len(self.spec.slices)
        start = first * slices + slice_index
        return self._rank_matrix[start : start + rows * slices : slices][:rows]

    def _storage(self, shape: tuple[int, ...]) -> torch.Tensor:
        self._whole = self._device.zeros((self.n_padded + self._rank_height, shape[1]), self.spec.dtype)
        return self._whole[: shape[0]]


def allocate(spec: WeightSpec, device: Device, tied: Weight | None = None) -> Weight:
    """Folded where a product can be; tables, experts and quantised weights are plain."""
    if spec.experts is not None or spec.quantisation is not None or spec.lookup:
        return TensorWeight(spec, device, tied)
    return FoldedWeight(spec, device, tied)
