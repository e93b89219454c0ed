"""Sampling state whose writes wait in the queue."""

from __future__ import annotations

import numpy as np
import torch

from polyaccel.backend import SamplingRow, SamplingSpec, SamplingState
from polyaccel.backend.composite.sampling_state import TensorSamplingState

from .device import FoldedDevice


class FoldedSamplingState(SamplingState):
    """The plain-torch state behind the queue.

    Whether a step returns logprobs is known when it is issued, from a host-side flag of each request slot.
    """

    def __init__(self, spec: SamplingSpec, device: FoldedDevice) -> None:
        self.spec = spec
        self.tensors = TensorSamplingState(spec, device)
        self.torch_device = device.torch_device
        self._queue = device.queue
        self._logprobs = np.zeros(spec.request_slots, dtype=bool)

    def write(self, slot: int, row: SamplingRow) -> None:
        self._logprobs[slot] = row.logprobs >= 0
        self._queue.put(lambda: self.tensors.write(slot, row))

    def clear(self, slot: int) -> None:
        self._logprobs[slot] = False
        self._queue.put(lambda: self.tensors.clear(slot))

    def last_tokens(self) -> torch.Tensor:
        return self.tensors.last_tokens()

    def wants_logprobs(self, slots: np.ndarray) -> bool:
        """Whether a request in ``slots`` (host array) asked for logprobs, as issued so far."""
        return bool(self._logprobs[slots].any())
