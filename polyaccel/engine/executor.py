"""How steps reach the workers. The engine core knows nothing else about processes or devices."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from polyaccel.backend.adapter_store import SlotRange
from polyaccel.engine.messages import Capacity, StepMessage, StepResult
from polyaccel.lora.receipt import AdapterReceipt


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedHandle:
    """An adapter that every rank has read, matched and packed; ``max_rank`` is the room it needs in rank rows."""

    token: int
    max_rank: int


class Executor(ABC):
    """Runs steps in the order they are submitted, on every rank.

    ``submit``, ``collect`` and everything that changes workers is called by one thread, the engine's;
    ``prepare_adapter`` may be called by any thread while steps run.
    """

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
    def prepare_adapter(
        self, path: str, *, allow_unmatched: bool = False, allow_no_effect: bool = False
    ) -> PreparedHandle:
        """Read, match and pack an adapter on every rank, beside running steps.

        Raises:
            AdapterError: it does not fit the model; nothing was changed on any rank.
        """

    @abstractmethod
    def commit_adapter(self, handle: PreparedHandle, name: str, where: SlotRange, generation: int) -> AdapterReceipt:
        """Write a prepared adapter into its slot on every rank; returns rank 0's receipt once all ranks acknowledged.

        Raises:
            UnsupportedError: policy strict refuses it; the slot is empty on every rank.
        """

    @abstractmethod
    def discard_adapter(self, handle: PreparedHandle) -> None:
        """Forget a prepared adapter that will not be committed."""

    @abstractmethod
    def clear_adapter(self, slot: int) -> None:
        """Empty a slot on every rank."""

    @abstractmethod
    def merge_adapter(self, path: str, weight: float) -> None:
        """Add an adapter's deltas to the base weights on every rank. No step may be in flight."""

    @abstractmethod
    def unmerge_adapters(self) -> None:
        """Restore the base weights bit for bit. No step may be in flight."""

    @abstractmethod
    def explain(self) -> list[dict[str, object]]:
        """Plan, ledger and graph counts of every rank, in rank order."""

    @abstractmethod
    def collectives(self) -> list[list[tuple[str, int]]]:
        """Each rank's traced collectives since the last call, as (kind, bytes)."""

    @abstractmethod
    def close(self) -> None:
        """Stop the workers. Idempotent; leaves no process behind."""
