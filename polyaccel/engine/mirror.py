"""Tokens sampled on one device, for the embedding on another: what a model over several devices needs each step."""

from __future__ import annotations

import torch

from polyaccel.backend.device import Device
from polyaccel.backend.sampling import SamplingRow, SamplingState


class MirroredSampling(SamplingState):
    """The last tokens of a sampling state on another device. It has no parameters: sampling is done there alone."""

    def __init__(self, source: SamplingState, device: Device) -> None:
        self.spec = source.spec
        self._source, self._device = source, device
        self.torch_device = device.torch_device
        with device.scope():
            self._tokens = device.zeros((source.spec.request_slots,), torch.int64)

    def refresh(self) -> None:
        """Copy what has been sampled so far; asynchronous, ordered with both devices' operators."""
        with self._device.scope():
            self._device.copy_(self._tokens, self._source.last_tokens())

    def write(self, slot: int, row: SamplingRow) -> None:
        return None

    def clear(self, slot: int) -> None:
        return None

    def last_tokens(self) -> torch.Tensor:
        return self._tokens
