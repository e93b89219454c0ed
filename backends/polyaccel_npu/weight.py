"""Weights: dense ``[n, k]`` buffers, handed to CANN as transpose views; never a transposed copy.

(A cached transposed copy goes stale when the weight is written again: vllm-ascend issue 5747.)
"""

from __future__ import annotations

import torch

from polyaccel.backend import Device, Weight, WeightSpec
from polyaccel.backend.composite.weight import TensorWeight


class TableWeight(TensorWeight):
    """An embedding table with a row of zeros before and one after it, where ids of other ranks are looked up.

    Attributes:
        padded: ``[n + 2, k]``; None where the storage is another weight's, which has no such rows.
    """

    def __init__(self, spec: WeightSpec, device: Device, tied: Weight | None = None) -> None:
        # Filled by _storage, which a tied weight does not call.
        self.padded: torch.Tensor | None = None
        super().__init__(spec, device, tied)
        if isinstance(tied, TableWeight):
            self.padded = tied.padded

    def _storage(self, shape: tuple[int, ...]) -> torch.Tensor:
        self.padded = self._device.zeros((shape[0] + 2, shape[1]), self.spec.dtype)
        return self.padded[1:-1]


def allocate(spec: WeightSpec, device: Device, tied: Weight | None = None) -> Weight:
    """Tables with rows of zeros about them, everything else plain."""
    if spec.lookup and spec.experts is None and spec.quantisation is None:
        return TableWeight(spec, device, tied)
    return TensorWeight(spec, device, tied)
