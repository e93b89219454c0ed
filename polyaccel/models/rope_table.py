"""The rotary tables of a model: angles in float64 on the host, cosines and sines in float32 on the device."""

from __future__ import annotations

import numpy as np

from polyaccel.backend.device import Device
from polyaccel.backend.rope import RopeTable
from polyaccel.models.rope_config import RopeConfig

# Rows of angles computed at a time: bounds the float64 intermediates of long contexts.
_CHUNK = 8192


def rope_table(config: RopeConfig, positions: int, device: Device) -> RopeTable:
    """cos and sin of positions ``0 .. positions - 1``: ``[positions, rotary_dim / 2]`` float32 on the device."""
    frequencies = config.inv_freq()
    cos = np.empty((positions, len(frequencies)), dtype=np.float32)
    sin = np.empty_like(cos)
    for start in range(0, positions, _CHUNK):
        stop = min(start + _CHUNK, positions)
        angles = np.arange(start, stop, dtype=np.float64)[:, None] * frequencies
        cos[start:stop] = np.cos(angles) * config.attention_factor
        sin[start:stop] = np.sin(angles) * config.attention_factor
    return RopeTable(cos=device.upload(cos), sin=device.upload(sin), rotary_dim=config.rotary_dim, style=config.style)
