"""Captured steps. Default: unsupported, and callers run eagerly."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from polyaccel.backend.sampling import SampleOutput
from polyaccel.backend.step import Step


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphKey:
    """What a decode graph is captured for: rows, the bucket of rank rows it covers (0: no adapters)."""

    rows: int
    rank_rows: int


StepFunction = Callable[[Step], SampleOutput]


class Graph(ABC):
    """A captured decode step. Replaying with any other step of the same key is right, whatever adapters it names."""

    key: GraphKey

    @abstractmethod
    def replay(self, step: Step) -> SampleOutput:
        """Run the captured work on ``step``'s metadata; outputs live until the next replay. Adds to the ledger."""

    @abstractmethod
    def close(self) -> None:
        """Free the graph. Graphs are closed before the communicator."""
