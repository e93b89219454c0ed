"""Every error polyaccel raises on purpose.

One tree, so that a caller can catch as coarsely or finely as needed. Messages say what failed, the value seen, and what
to do. Errors cross process boundaries by pickling; each class therefore rebuilds from its own ``args``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class PolyaccelError(Exception):
    """Base of every error in this package."""


class ConfigurationError(PolyaccelError, ValueError):
    """An option has a value that cannot work; the message names option, value and what is accepted."""


# --- models ---------------------------------------------------------------------------------------------------------


class ModelError(PolyaccelError):
    """A model could not be used."""


class ModelNotFound(ModelError, FileNotFoundError):
    """No such model on this machine. Nothing is ever downloaded silently; the message holds the command to run."""


class ModelLoadError(ModelError):
    """A checkpoint is damaged, hostile, incomplete or of a kind that is not supported."""


# --- adapters -------------------------------------------------------------------------------------------------------


class AdapterError(PolyaccelError):
    """An adapter could not be used."""


class AdapterNotFound(AdapterError, KeyError):
    """A request or call names an adapter that is not loaded, or a folder that does not exist."""

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0]) if self.args else ""


class AdapterIncompatible(AdapterError, ValueError):
    """The adapter does not fit the model, or uses a feature that is refused by name."""


# --- backends -------------------------------------------------------------------------------------------------------


class BackendError(PolyaccelError):
    """Something below the contract failed."""


class BackendUnavailable(BackendError):
    """A backend cannot be used here; the message gives distribution, entry point, cause and the way round."""


class UnsupportedError(BackendError):
    """The plan has no permitted implementation of an operator; the message lists every reason."""


@dataclass(frozen=True, slots=True)
class OperandInfo:
    """What an error needs to say about one tensor, without keeping the tensor alive."""

    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str
    device: str
    contiguous: bool

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> OperandInfo:
        return cls(
            name=name,
            shape=tuple(tensor.shape),
            stride=tuple(tensor.stride()),
            dtype=str(tensor.dtype).removeprefix("torch."),
            device=str(tensor.device),
            contiguous=tensor.is_contiguous(),
        )

    def __str__(self) -> str:
        layout = "contiguous" if self.contiguous else "non-contiguous"
        return f"{self.name}: {self.dtype}{list(self.shape)} stride {list(self.stride)} on {self.device}, {layout}"


class OperatorError(BackendError):
    """An operator failed or was handed operands outside its contract.

    Attributes: ``operator``, ``reason``, ``rank`` (or None), ``operands`` (each tensor's shape, stride, dtype, device).
    """

    def __init__(
        self, operator: str, reason: str, operands: Sequence[OperandInfo] = (), rank: int | None = None
    ) -> None:
        super().__init__(operator, reason, tuple(operands), rank)
        self.operator = operator
        self.reason = reason
        self.operands = tuple(operands)
        self.rank = rank

    @classmethod
    def describe(
        cls, operator: str, reason: str, tensors: Mapping[str, torch.Tensor], rank: int | None = None
    ) -> OperatorError:
        return cls(operator, reason, [OperandInfo.of(name, t) for name, t in tensors.items()], rank)

    def __str__(self) -> str:
        where = "" if self.rank is None else f" on rank {self.rank}"
        lines = [f"operator {self.operator!r}{where}: {self.reason}"]
        lines += [f"  {operand}" for operand in self.operands]
        return "\n".join(lines)


class DeviceLost(BackendError):
    """The device reported a failure after which its results cannot be trusted; restart the engine."""


class OutOfMemory(BackendError, MemoryError):
    """The device has too little memory; the message says what was asked for, what is free and which option to lower."""


class CommunicationError(BackendError):
    """Ranks disagree or one did not answer in time; the message names the collective, the rank and the time waited."""


# --- requests and the engine ----------------------------------------------------------------------------------------


class RequestError(PolyaccelError):
    """One request failed; no other request is affected."""


class RequestRejected(RequestError, ValueError):
    """A request's values are invalid; it never reached the scheduler."""


class RequestTooLong(RequestRejected):
    """Prompt and max_tokens exceed the model's context or the KV cache."""


class RequestAborted(RequestError):
    """The request was aborted by its caller or by ``close()``."""


class EngineDead(PolyaccelError):
    """The engine cannot go on; ``__cause__`` carries the worker's own error with its traceback text."""


class WorkerError(PolyaccelError):
    """An exception in a worker process, with the worker's traceback as text.

    Attributes: ``rank``, ``traceback_text``.
    """

    def __init__(self, rank: int, summary: str, traceback_text: str) -> None:
        super().__init__(rank, summary, traceback_text)
        self.rank = rank
        self.summary = summary
        self.traceback_text = traceback_text

    def __str__(self) -> str:
        return f"worker of rank {self.rank}: {self.summary}\n--- traceback of the worker ---\n{self.traceback_text}"
