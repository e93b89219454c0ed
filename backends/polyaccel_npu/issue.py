"""Launches: through the guard, with failures read and told apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

from polyaccel.backend import CommunicationError, Launcher, OperatorError, OutOfMemory
from polyaccel_npu.errors import parse
from polyaccel_npu.health import Health
from polyaccel_npu.journal import Journal
from polyaccel_npu.operands import Operands

R = TypeVar("R")


class Issuer:
    """How one backend instance reaches its devices.

    Attributes:
        launcher: the guard, which writes the ledger.
        health: whether anything that devices return can be trusted.
        operands: the normaliser.
        journal: calls since the last wait, for replays; None if nobody wants them.
    """

    def __init__(self, launcher: Launcher, health: Health, journal: Journal | None = None) -> None:
        self.launcher, self.health, self.journal = launcher, health, journal
        self.operands = Operands(launcher.ledger)

    def issue(
        self,
        kernel: str,
        operands: Mapping[str, torch.Tensor | None],
        fn: Callable[..., R],
        /,
        *args: Any,
        **kwargs: Any,
    ) -> R:
        """``fn(*args, **kwargs)`` in the operands' device scope, counted as ``npu.<kernel>``.

        Raises:
            OperatorError: refused on the spot, with each operand's shape, stride, dtype and contiguity.
            DeviceLost: an earlier call failed asynchronously.
            OutOfMemory: no room for the result or the workspace.
            CommunicationError: HCCL refused, or another rank did not come.
        """
        self.health.check()
        if self.journal is not None:
            self.journal.note(kernel, fn, args, kwargs)
        try:
            return self.launcher.launch(f"npu.{kernel}", operands, fn, *args, **kwargs)
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(f"npu.{kernel}: {error}") from error
        except RuntimeError as error:
            raise self.explained(kernel, operands, error) from error

    def tensor(
        self,
        kernel: str,
        operands: Mapping[str, torch.Tensor | None],
        fn: Callable[..., object],
        /,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """:meth:`issue` for operators that give one tensor."""
        result = self.issue(kernel, operands, fn, *args, **kwargs)
        assert isinstance(result, torch.Tensor)
        return result

    def explained(self, kernel: str, operands: Mapping[str, torch.Tensor | None], error: RuntimeError) -> Exception:
        """The contract's error for what torch_npu raised."""
        failure = parse(str(error))
        rank = self.launcher.rank
        if failure.asynchronous:
            return self.health.lose(failure, rank)
        if failure.out_of_memory:
            return OutOfMemory(f"npu.{kernel}: {failure}")
        if failure.communication:
            return CommunicationError(f"npu.{kernel}{'' if rank is None else f' on rank {rank}'}: {failure}")
        given = {name: tensor for name, tensor in operands.items() if tensor is not None}
        reason = str(failure) if failure.is_npu else str(error)
        return OperatorError.describe(f"npu.{kernel}", reason, given, rank if rank is not None else failure.rank)
