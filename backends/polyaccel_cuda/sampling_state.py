"""Sampling state whose host part can be held still while a step is tried out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from polyaccel.backend.composite.sampling_state import StepNeeds, TensorSamplingState


class CudaSamplingState(TensorSamplingState):
    """As the composite's; ``rehearsal`` undoes what a step changes."""

    _rehearsing = False

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Steps of the block leave no trace: capturing one runs it once or twice before it counts."""
        last = self._last.clone()
        counts = None if self.output_counts is None else self.output_counts.clone()
        self._rehearsing = True
        try:
            yield
        finally:
            self._rehearsing = False
            self._last.copy_(last)
            if counts is not None and self.output_counts is not None:
                self.output_counts.copy_(counts)

    def count_outputs(self, slots: np.ndarray) -> None:
        """The host's part of a replayed step: requests with forbidden ids have one output more."""
        if self._limited:
            for slot in slots.tolist():
                self._count_output(slot)

    def sampled(self, slots: np.ndarray) -> None:
        """The host's part of a step whose kernel wrote last tokens and counts."""
        if not self._rehearsing:
            self.count_outputs(slots)

    def advance(self, slots: np.ndarray, rows: torch.Tensor, ids: torch.Tensor, needs: StepNeeds) -> None:
        if self._rehearsing:
            slots = slots[:0]
        super().advance(slots, rows, ids, needs)
