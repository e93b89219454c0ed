"""How ranks talk. Every collective is traced in the core: kind, bytes, count."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from polyaccel.backend.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class Collective:
    """One traced call: its kind and the bytes of this rank's input tensor."""

    kind: str
    nbytes: int


class Communicator(ABC):
    """A group of ranks that call the same collectives in the same order.

    The public methods record into ``trace`` while it is a list and then call the backend's ``_``-methods. All are
    ordered with the operators of the device of their tensor.
    """

    rank: int
    world_size: int
    transport: str

    def __init__(self) -> None:
        self.trace: list[Collective] | None = None

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place; returns ``x``. All ranks end with identical bits."""
        self._note("all_reduce", x)
        self._all_reduce(x)
        return x

    def all_gather(self, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """Concatenate equal-shaped tensors along ``dim``, in rank order; a new tensor."""
        self._note("all_gather", x)
        return self._all_gather(x, dim)

    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over ranks; this rank's equal share of dimension 0, a new tensor.

        Raises:
            ConfigurationError: dimension 0 is not a multiple of the world size.
        """
        if x.shape[0] % self.world_size:
            raise ConfigurationError(
                f"reduce_scatter of {x.shape[0]} rows over {self.world_size} ranks: not a multiple"
            )
        self._note("reduce_scatter", x)
        return self._reduce_scatter(x)

    def all_to_all(self, x: torch.Tensor, send_rows: list[int], receive_rows: list[int]) -> torch.Tensor:
        """Send ``send_rows[r]`` rows of ``x`` to rank r, receive ``receive_rows[r]``; joined in rank order."""
        self._note("all_to_all", x)
        return self._all_to_all(x, send_rows, receive_rows)

    def broadcast(self, x: torch.Tensor, source: int = 0) -> torch.Tensor:
        """Copy the source rank's content into every rank's ``x``, in place; returns ``x``."""
        self._note("broadcast", x)
        self._broadcast(x, source)
        return x

    def barrier(self) -> None:
        """Return when every rank has called it."""
        if self.trace is not None:
            self.trace.append(Collective("barrier", 0))
        self._barrier()

    def _note(self, kind: str, x: torch.Tensor) -> None:
        if self.trace is not None:
            self.trace.append(Collective(kind, x.numel() * x.element_size()))

    @abstractmethod
    def gather_objects(self, value: object) -> list[object]:
        """Every rank's small picklable value, in rank order. Control plane: for plans and hashes, never inside a
        step."""

    def abandon(self) -> None:
        """Give the group up, from a rank that cannot go on: whoever waits for it, here or on another rank, is let go
        with a CommunicationError, at once where the transport allows. It can only be closed then.

        Closing is enough where that breaks the others' collectives.
        """
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Leave the group. Idempotent."""

    @abstractmethod
    def _all_reduce(self, x: torch.Tensor) -> None: ...

    @abstractmethod
    def _all_gather(self, x: torch.Tensor, dim: int) -> torch.Tensor: ...

    @abstractmethod
    def _reduce_scatter(self, x: torch.Tensor) -> torch.Tensor: ...

    @abstractmethod
    def _all_to_all(self, x: torch.Tensor, send_rows: list[int], receive_rows: list[int]) -> torch.Tensor: ...

    @abstractmethod
    def _broadcast(self, x: torch.Tensor, source: int) -> None: ...

    @abstractmethod
    def _barrier(self) -> None: ...


class SingleRank(Communicator):
    """The group of one: every collective is the identity."""

    rank = 0
    world_size = 1
    transport = "none"

    def gather_objects(self, value: object) -> list[object]:
        return [value]

    def close(self) -> None:
        return None

    def _all_reduce(self, x: torch.Tensor) -> None:
        return None

    def _all_gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        return x

    def _reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def _all_to_all(self, x: torch.Tensor, send_rows: list[int], receive_rows: list[int]) -> torch.Tensor:
        return x

    def _broadcast(self, x: torch.Tensor, source: int) -> None:
        return None

    def _barrier(self) -> None:
        return None
