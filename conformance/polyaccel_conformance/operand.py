"""A tensor argument as the case defines it: exact values on the host."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from polyaccel_conformance.formats import FORMATS, to_torch


@dataclass(frozen=True, slots=True, eq=False)
class Operand:
    """``values``: float64 or int64, every one representable in ``dtype`` (a name of :mod:`formats`)."""

    values: npt.NDArray[np.generic]
    dtype: str

    @classmethod
    def rounded(cls, values: npt.ArrayLike, dtype: str) -> Operand:
        """Any values, rounded to nearest; infinities and NaN are kept."""
        if dtype in FORMATS:
            return cls(FORMATS[dtype].round(values), dtype)
        return cls(np.asarray(values, dtype=np.int64), dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    def torch(self) -> torch.Tensor:
        """A new contiguous host tensor."""
        return to_torch(self.values, self.dtype)

    def digest(self) -> str:
        """Hash of shape, dtype and values, the same on every machine."""
        exact = np.ascontiguousarray(self.values)
        hasher = hashlib.sha256(f"{self.dtype}{exact.shape}{exact.dtype.str}".encode())
        hasher.update(exact.astype(exact.dtype.newbyteorder("<"), copy=False).tobytes())
        return hasher.hexdigest()[:32]
