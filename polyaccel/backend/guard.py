"""The one guarded launch path.

Every device launch of every backend goes through :class:`Launcher`. It checks that all operands share one device,
enters that device if it is not current, lets the caller take the stream inside the scope, restores device and stream
on exit and on exception, and writes the ledger. Founding case: one operator without a device guard gave an illegal
memory access on a second GPU; Triton launches have the same hole (Triton issue 2925).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import ParamSpec, TypeVar

import torch

from polyaccel.backend.errors import OperatorError
from polyaccel.backend.ledger import Ledger

P = ParamSpec("P")
R = TypeVar("R")


class Launcher:
    """Launches kernels for one backend instance.

    ``enter(device)`` returns a context manager that makes ``device`` current and restores what was current before,
    also on an exception; ``is_current(device)`` lets the common case skip it.
    """

    def __init__(
        self,
        ledger: Ledger,
        *,
        enter: Callable[[torch.device], AbstractContextManager[object]] | None = None,
        is_current: Callable[[torch.device], bool] | None = None,
        rank: int | None = None,
    ) -> None:
        self.ledger = ledger
        self.rank = rank
        self._enter = enter if enter is not None else _no_scope
        self._is_current = is_current if is_current is not None else _always_current

    def launch(
        self,
        kernel: str,
        operands: Sequence[torch.Tensor | None],
        fn: Callable[P, R],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R:
        """Run ``fn(*args, **kwargs)`` in the operands' device scope and record ``kernel``.

        ``operands``: every tensor the kernel touches, in the order of the call; None entries are skipped.

        Raises:
            OperatorError: two operands live on different devices; the message lists each with its index.
        """
        device = self.common_device(kernel, operands)
        self.ledger.record(kernel)
        if self._is_current(device):
            return fn(*args, **kwargs)
        with self._enter(device):
            return fn(*args, **kwargs)

    def common_device(self, kernel: str, operands: Sequence[torch.Tensor | None]) -> torch.device:
        """The device shared by all operands; a typed error naming the odd one out otherwise."""
        device: torch.device | None = None
        for tensor in operands:
            if tensor is None:
                continue
            if device is None:
                device = tensor.device
            elif tensor.device != device:
                raise self._mixed(kernel, operands)
        if device is None:
            raise OperatorError(kernel, "was launched without a tensor operand", (), self.rank)
        return device

    def _mixed(self, kernel: str, operands: Sequence[torch.Tensor | None]) -> OperatorError:
        named = {index: tensor for index, tensor in enumerate(operands) if tensor is not None}
        first = next(iter(named))
        other = next(index for index, tensor in named.items() if tensor.device != named[first].device)
        reason = (
            f"operand {other} is on {named[other].device} but operand {first} is on {named[first].device}; "
            "move it there first"
        )
        tensors = {f"operand {index}": tensor for index, tensor in named.items()}
        return OperatorError.describe(kernel, reason, tensors, self.rank)


def _no_scope(device: torch.device) -> AbstractContextManager[object]:
    return nullcontext()


def _always_current(device: torch.device) -> bool:
    return True
