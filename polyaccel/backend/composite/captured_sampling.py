"""Sampling state for graphs: its host part can be held still while a step is tried out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from polyaccel.backend.composite.sampling_state import StepNeeds, TensorSamplingState
from polyaccel.backend.errors import UnsupportedError
from polyaccel.backend.step import Step


class CapturedSamplingState(TensorSamplingState):
    """As the composite's; ``rehearsal`` undoes what a step changes."""

    _rehearsing = False

    @classmethod
    def of(cls, step: Step) -> tuple[CapturedSamplingState, object]:
        """A decode step's sampling state, and what a capture of the step reads of it: equal for two steps that the
        same capture serves.

        Raises:
            UnsupportedError: the step has none.
        """
        state = step.state.sampling
        if not isinstance(state, cls):
            raise UnsupportedError("a graph is captured for decode steps, which sample")
        # Wide tables appear when a request first needs them; a capture made before does not read them.
        tables = (state.output_counts is None, state.bias is None, state.allowed is None)
        return state, (state.needs(step.input.sample_slots), tables)

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
