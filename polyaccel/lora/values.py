"""Largest magnitude of a tensor from its bit patterns: a vectorised pass for each sign, no temporary, one thread."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch

from polyaccel.backend.errors import AdapterIncompatible


def bits_of(tensor: torch.Tensor) -> npt.NDArray[np.signedinteger]:
    """The tensor's elements as signed integers of the same width; a view."""
    return tensor.view(torch.int32 if tensor.dtype.itemsize == 4 else torch.int16).numpy()


def largest_magnitude(tensor: torch.Tensor) -> float:
    """``max |x|`` of a float32, float16 or bfloat16 CPU tensor of any strides; infinite where any value is not finite.

    The bits of a float without its sign bit, read as an integer, order like its magnitude. An empty tensor gives 0.

    Raises:
        AdapterIncompatible: another dtype.
    """
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise AdapterIncompatible(f"values of dtype {tensor.dtype} cannot be checked")
    if tensor.numel() == 0:
        return 0.0
    signed = bits_of(tensor)
    # A positive float is the largest signed pattern, a negative one the largest unsigned pattern.
    if tensor.dtype == torch.float32:
        bits = max(int(signed.max()), int(signed.view(np.uint32).max()) - (1 << 31), 0)
        value = float(np.uint32(bits).view(np.float32))
    else:
        bits = max(int(signed.max()), int(signed.view(np.uint16).max()) - (1 << 15), 0)
        if tensor.dtype == torch.float16:
            value = float(np.uint16(bits).view(np.float16))
        else:
            value = float(np.uint32(bits << 16).view(np.float32))
    return value if math.isfinite(value) else math.inf
