"""What torch, or a vendor's kernel, raises inside an operator, as the contract's own error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from polyaccel.backend.errors import OperatorError, PolyaccelError

UNTYPED: tuple[type[Exception], ...] = (RuntimeError, TypeError, ValueError, IndexError)
"""What libraries raise for operands that they cannot take."""


def typed(
    operator: str, error: Exception, args: Sequence[object], kwargs: Mapping[str, object], rank: int | None = None
) -> Exception:
    """An OperatorError with the operator, every tensor by its argument's name, and the message of ``error``.

    The error itself where it is one of the contract's, says that memory ran out, or that torch lacks an operator on
    this device.
    """
    if isinstance(error, PolyaccelError | torch.OutOfMemoryError | NotImplementedError):
        return error
    from polyaccel.backend.stations import STATIONS
    from polyaccel.backend.vocabulary import OPERATORS

    spec = OPERATORS.get(operator) or STATIONS.get(operator)
    names = [argument.name for argument in spec.arguments] if spec is not None else []
    names += [f"argument {i}" for i in range(len(names), len(args))]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
    return OperatorError.describe(operator, f"{type(error).__name__}: {error}", tensors, rank)
