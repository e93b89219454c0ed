"""Rotary tables: operands of the rotary operators, computed by the core in float64 and stored as float32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

RopeStyle = Literal["half", "interleaved"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeTable:
    """``cos, sin: [positions, rotary_dim / 2]`` float32 on the device.

    ``style``: pairs (i, i + rotary_dim / 2) for half, (2 i, 2 i + 1) for interleaved; dimensions from ``rotary_dim``
    on pass through unrotated.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    rotary_dim: int
    style: RopeStyle = "half"
