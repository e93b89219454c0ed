"""Rotary tables are exact to float32 at any position."""

from __future__ import annotations

import math

import numpy as np
import pytest

from polyaccel.backend.device import TorchDevice
from polyaccel.models.rope_config import RopeConfig
from polyaccel.models.rope_table import rope_table

POSITIONS = (0, 1, 2047, 8191, 8192, 19_999)


@pytest.mark.parametrize("factor", [1.0, 1.25])
def test_cos_and_sin_are_the_float64_values_rounded_once(factor: float) -> None:
    config = RopeConfig(theta=500_000.0, rotary_dim=16, attention_factor=factor)
    table = rope_table(config, 20_000, TorchDevice("cpu"))
    assert table.cos.shape == table.sin.shape == (20_000, 8)
    assert (table.rotary_dim, table.style) == (16, "half")
    for position in POSITIONS:
        for pair in range(8):
            angle = position * 500_000.0 ** (-2 * pair / 16)
            # The power's last bit times 20,000 positions is some 1e-12; rounding to float32 is 6e-8.
            assert float(table.cos[position, pair]) == pytest.approx(np.float32(math.cos(angle) * factor), abs=1.5e-7)
            assert float(table.sin[position, pair]) == pytest.approx(np.float32(math.sin(angle) * factor), abs=1.5e-7)


def test_the_style_and_the_rotated_part_come_from_the_configuration() -> None:
    table = rope_table(RopeConfig(theta=100.0, rotary_dim=4, style="interleaved"), 3, TorchDevice("cpu"))
    assert table.style == "interleaved"
    assert table.cos.shape == (3, 2)
