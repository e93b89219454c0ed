"""A weight packed once for oneDNN, which then serves every number of rows."""

from __future__ import annotations

import torch

from polyaccel.backend.composite.tiles import ragged
from polyaccel.backend.composite.weight import TensorWeight
from polyaccel.backend.cpu.packed import Packed, pack, packs
from polyaccel.backend.device import Device
from polyaccel.backend.weight import Weight, WeightSpec


class PackedWeight(TensorWeight):
    """Plain while it is written; sealed, float matrices are kept in one of oneDNN's layouts and nowhere else.

    Embedding tables, experts, quantised weights and dtypes that oneDNN does not take stay as they are. A weight tied to
    an embedding table has a packed copy of its own, since rows of the packed layout cannot be looked up; tied to
    anything else it shares the packed form.
    """

    def __init__(self, spec: WeightSpec, device: Device, tied: Weight | None = None) -> None:
        super().__init__(spec, device, tied)
        self._tied = tied if isinstance(tied, PackedWeight) else None
        self._packed: Packed | None = None
        # Counts seals, so that a packed copy of another weight's values knows when they have changed.
        self._generation = 0
        self._copied = -1
        self._packable = (
            spec.experts is None
            and spec.quantisation is None
            and not spec.lookup
            and spec.n > 0
            and spec.k > 0
            and packs(spec.dtype)
            and not ragged(spec.dtype, spec.k)
        )

    @property
    def packed(self) -> Packed | None:
        """The opaque packed matrix ``[n, k]``, or None where the plain one is used."""
        tied = self._tied
        if tied is None:
            return self._packed
        if not self._packable or not tied._sealed:
            return None
        if tied._packed is not None:
            return tied._packed
        if self._copied != tied._generation:
            self._packed = pack(tied.tensor)
            self._copied = tied._generation
        return self._packed

    @property
    def tensor(self) -> torch.Tensor:
        """``[n, k]`` (``[experts, n, k]``) of the weight's dtype: the storage itself, or an unpacked copy."""
        packed = self._packed if self._tied is None else self._tied._packed
        if packed is not None:
            return packed.plain()
        return super().tensor if self._tied is None else self._tied.tensor

    def seal(self) -> None:
        if self._sealed:
            return
        super().seal()
        self._generation += 1
        if self._tied is not None:
            # Packed now rather than in the first step, if the values are complete.
            _ = self.packed
        elif self._packable and self._tensor is not None:
            self._packed, self._tensor = pack(self._tensor), None

    def reopen(self) -> None:
        super().reopen()
        if self._tied is not None:
            self._packed, self._copied = None, -1
        elif self._packed is not None:
            self._tensor, self._packed = self._packed.plain(), None

    @property
    def nbytes(self) -> int:
        """Bytes held by this weight itself: storage shared with a tied weight counts there."""
        if self._packed is None:
            return super().nbytes
        bias = 0 if self.bias is None else self.bias.numel() * self.bias.element_size()
        return bias + self._packed.nbytes
