"""W and the adapters' A in one buffer, so that one product gives y and the h of every slot."""

from __future__ import annotations

from typing import NoReturn

import torch

from polyaccel.backend import OperatorError, Weight, WeightSpec
from polyaccel.backend.weight import check_write

from .device import FoldedDevice, poison_

K_MULTIPLE, N_MULTIPLE = 8, 16


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


class FoldedWeight(Weight):
    """``buffer: [k_padded, n_padded + rank_rows * slices, padded]``, with a leading ``experts`` where the spec has it.

    Columns ``0:n`` hold W transposed; rank row r of slice s is column ``n_padded + r * slices + s``, so that a prefix
    of the columns holds the first rank rows of all slices. An embedding table, of which columns are looked up, has its
    rank rows below instead: row ``k_padded + r``. Rows that pad k are zero; columns that pad n, and rank rows that
    nobody has written, are NaN. Quantised weights are stored as dequantised.

    Writes are immediate: no step may be queued that reads the weight.
    """

    def __init__(self, spec: WeightSpec, device: FoldedDevice, tied: Weight | None = None) -> None:
        self.spec = spec
        self._device = device
        self.torch_device = device.torch_device
        self._tied = None if tied is None else folded("Weight.allocate", tied)
        self._sealed = False
        self.k_padded, self.n_padded = _up(spec.k, K_MULTIPLE), _up(spec.n, N_MULTIPLE)
        columns, rows = self.n_padded, self.k_padded
        if spec.lookup:
            rows = _up(rows + spec.rank_rows, K_MULTIPLE)
        else:
            columns = _up(columns + spec.rank_rows * len(spec.slices), N_MULTIPLE)
        lead = () if spec.experts is None else (spec.experts,)
        self.buffer = poison_(torch.empty((*lead, rows, columns), dtype=spec.dtype))
        self.buffer[..., spec.k : self.k_padded, :] = 0.0
        self.bias = torch.zeros((*lead, spec.n), dtype=spec.dtype) if spec.bias else None

    # -- reading -------------------------------------------------------------------------------------------------------

    def dense(self) -> torch.Tensor:
        """View ``[n, k]`` (``[experts, n, k]``)."""
        return self.buffer[..., : self.spec.k, : self.spec.n].transpose(-1, -2)

    def rank_rows(self, slice_index: int, first: int, rows: int, expert: int | None) -> torch.Tensor:
        """View ``[rows, k]`` (``[rows, n]`` of an embedding): A's rows in place."""
        buffer = self.buffer if expert is None else self.buffer[expert]
        if self.spec.lookup:
            return buffer[self.k_padded + first : self.k_padded + first + rows, : self.spec.n]
        slices = len(self.spec.slices)
        start = self.n_padded + first * slices + slice_index
        return buffer[: self.spec.k, start : start + rows * slices : slices].T

    # -- writing -------------------------------------------------------------------------------------------------------

    def write(
        self, slice_index: int, source: torch.Tensor, *, row: int = 0, col: int = 0, expert: int | None = None
    ) -> None:
        check_write(self.spec, slice_index, source.shape, row, col, expert)
        self._check_open()
        if self._tied is not None:
            self._refuse(f"has the values of {self._tied.spec.site!r}; write there")
        self._device.synchronize()
        rows, cols = source.shape
        start = self.spec.starts[slice_index] + row
        buffer = self.buffer if expert is None else self.buffer[expert]
        buffer[col : col + cols, start : start + rows].copy_(source.T)

    def write_bias(self, slice_index: int, source: torch.Tensor, *, row: int = 0, expert: int | None = None) -> None:
        check_write(self.spec, slice_index, (source.shape[0], 0), row, 0, expert)
        self._check_open()
        if self.bias is None:
            self._refuse("was allocated without a bias")
        self._device.synchronize()
        start = self.spec.starts[slice_index] + row
        bias = self.bias if expert is None else self.bias[expert]
        bias[start : start + source.shape[0]].copy_(source)

    def write_quantised(
        self,
        slice_index: int,
        codes: torch.Tensor,
        zeros: torch.Tensor,
        scales: torch.Tensor,
        *,
        row: int = 0,
        col: int = 0,
        expert: int | None = None,
    ) -> None:
        quantisation = self.spec.quantisation
        if quantisation is None:
            self._refuse("is not quantised; use write")
        if col % quantisation.group_size:
            self._refuse(f"column {col} does not start a group of {quantisation.group_size}")
        group = torch.arange(codes.shape[1]) // quantisation.group_size
        values = (codes.to(torch.int16) - zeros.to(torch.int16)[:, group]).float() * scales.float()[:, group]
        self.write(slice_index, values.to(self.spec.dtype), row=row, col=col, expert=expert)

    def seal(self) -> None:
        """A tied weight takes its values here: the two layouts have no room for both adapters in one buffer."""
        if self._tied is not None:
            self._device.synchronize()
            self.buffer[..., : self.spec.k, : self.spec.n].copy_(self._tied.dense().transpose(-1, -2))
        self._sealed = True

    def reopen(self) -> None:
        self._sealed = False

    @property
    def nbytes(self) -> int:
        experts = 1 if self.spec.experts is None else self.spec.experts
        bias = 0 if self.bias is None else self.bias.numel()
        return (experts * self.k_padded * self.n_padded + bias) * self.spec.dtype.itemsize

    def _check_open(self) -> None:
        if self._sealed:
            self._refuse("is sealed; call reopen() before writing")

    def _refuse(self, reason: str) -> NoReturn:
        raise OperatorError(f"Weight.write({self.spec.site})", f"the weight {reason}")


def folded(operator: str, weight: Weight) -> FoldedWeight:
    """The weight as this backend's own.

    Raises:
        OperatorError: another backend's weight.
    """
    if not isinstance(weight, FoldedWeight):
        raise OperatorError(operator, f"takes a FoldedWeight, not the {type(weight).__name__} of {weight.spec.site!r}")
    return weight
