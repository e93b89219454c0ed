"""A weight that is stored transposed, so that the product needs no transposition."""

from __future__ import annotations

from typing import NoReturn

import torch

from polyaccel.backend import Device, OperatorError, Weight, WeightSpec
from polyaccel.backend.weight import check_write


class TransposedWeight(Weight):
    """``stored: [k, n]`` (``[experts, k, n]``) of the weight's dtype."""

    def __init__(self, spec: WeightSpec, device: Device, tied: Weight | None = None) -> None:
        self.spec = spec
        lead = () if spec.experts is None else (spec.experts,)
        self._tied = tied is not None
        self.stored: torch.Tensor
        if isinstance(tied, TransposedWeight):
            self.stored = tied.stored
        else:
            self.stored = device.zeros((*lead, spec.k, spec.n), spec.dtype)
        self.bias = device.zeros((*lead, spec.n), spec.dtype) if spec.bias else None
        self._sealed = False

    def write(
        self, slice_index: int, source: torch.Tensor, *, row: int = 0, col: int = 0, expert: int | None = None
    ) -> None:
        check_write(self.spec, slice_index, source.shape, row, col, expert)
        if self._sealed:
            self._refuse("is sealed")
        if self._tied:
            self._refuse("shares another weight's storage")
        start = self.spec.starts[slice_index] + row
        stored = self.stored if expert is None else self.stored[expert]
        stored[col : col + source.shape[1], start : start + source.shape[0]].copy_(source.T)

    def write_bias(self, slice_index: int, source: torch.Tensor, *, row: int = 0, expert: int | None = None) -> None:
        if self._sealed or self.bias is None:
            self._refuse("is sealed" if self._sealed else "has no bias")
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
        self._refuse("is a float weight")

    def seal(self) -> None:
        self._sealed = True

    def reopen(self) -> None:
        self._sealed = False

    @property
    def nbytes(self) -> int:
        held = [] if self._tied else [self.stored]
        held += [] if self.bias is None else [self.bias]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    def _refuse(self, reason: str) -> NoReturn:
        raise OperatorError(f"Weight.write({self.spec.site})", f"the weight {reason}")
