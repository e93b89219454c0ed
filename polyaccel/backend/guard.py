"""The one guarded launch path.

Every device launch of every backend goes through :class:`Launcher`. It checks that all operands share one device,
enters that device if it is not current, lets the caller take the stream inside the scope, restores device and stream
on exit and on exception, and writes the ledger. Founding case: one operator without a device guard gave an illegal
memory access on a second GPU; Triton launches have the same hole (Triton issue 2925).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import ParamSpec, TypeVar

import torch

from polyaccel.backend.errors import OperatorError
from polyaccel.backend.ledger import Ledger

P = ParamSpec("P")
R = TypeVar("R")

Operands = Sequence[torch.Tensor | None] | Mapping[str, torch.Tensor | None]
"""The tensors that a kernel touches, in the order of the call or, for errors that name them, by argument."""


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
        operands: Operands,
        fn: Callable[P, R],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R:
        """Run ``fn(*args, **kwargs)`` in the operands' device scope and record ``kernel``.

        ``operands``: every tensor the kernel touches, in the order of the call or by argument name; None entries are
        skipped.

        Raises:
            OperatorError: two operands live on different devices; the message lists each with its name or index.
        """
        device = self.common_device(kernel, operands)
        self.ledger.record(kernel)
        if self._is_current(device):
            return fn(*args, **kwargs)
        with self._enter(device):
            return fn(*args, **kwargs)

    def common_device(self, kernel: str, operands: Operands) -> torch.device:
        """The device shared by all operands; a typed error naming the odd one out otherwise."""
        device: torch.device | None = None
        for tensor in operands.values() if isinstance(operands, Mapping) else operands:
            if tensor is None:
                continue
            if device is None:
                device = tensor.device
            elif tensor.device != device:
                raise self._mixed(kernel, operands)
        if device is None:
            raise OperatorError(kernel, "was launched without a tensor operand", (), self.rank)
        return device

    def _mixed(self, kernel: str, operands: Operands) -> OperatorError:
        if isinstance(operands, Mapping):
            named = {name: tensor for name, tensor in operands.items() if tensor is not None}
        else:
            named = {f"operand {i}": tensor for i, tensor in enumerate(operands) if tensor is not None}
        first = next(iter(named))
        other = next(name for name, tensor in named.items() if tensor.device != named[first].device)
        reason = f"{other} is on {named[other].device} but {first} is on {named[first].device}; move it there first"
        return OperatorError.describe(kernel, reason, named, self.rank)


def _no_scope(device: torch.device) -> AbstractContextManager[object]:
    return nullcontext()


def _always_current(device: torch.device) -> bool:
    return True
