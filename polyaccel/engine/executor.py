"""How steps reach the workers. The engine core knows nothing else about processes or devices."""

from __future__ import annotations

from abc import ABC, abstractmethod

from polyaccel.backend.adapter_store import SlotRange
from polyaccel.engine.messages import Capacity, StepMessage, StepResult


class Executor(ABC):
    """Runs steps in the order they are submitted, on every rank."""

    capacity: Capacity

    @abstractmethod
    def submit(self, message: StepMessage) -> None:
        """Queue a step. Returns before it has run where the device or another process runs it.

        Raises:
            EngineDead: a worker failed; the cause is attached.
        """

    @abstractmethod
    def collect(self) -> StepResult:
        """Block until the oldest submitted step has completed and return its result.

        Raises:
            EngineDead: a worker failed, or did not answer within the executor's timeout.
        """

    @abstractmethod
    def load_adapter(self, name: str, path: str, where: SlotRange, **options: object) -> dict[str, object]:
        """Load an adapter into a slot on every rank; returns the receipt of rank 0 once all ranks acknowledged."""

    @abstractmethod
    def clear_adapter(self, slot: int) -> None:
        """Empty a slot on every rank."""

    @abstractmethod
    def close(self) -> None:
        """Stop the workers. Idempotent; leaves no process behind."""
