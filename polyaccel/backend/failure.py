"""What torch, or a vendor's kernel, raises inside an operator, as the contract's own error."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch

from polyaccel.backend.errors import OperatorError, OutOfMemory, PolyaccelError
from polyaccel.backend.placed import describe_operands

UNTYPED: tuple[type[Exception], ...] = (RuntimeError, TypeError, ValueError, IndexError)
"""What libraries raise for operands that they cannot take."""
NO_MEMORY = ("out of memory", "ALLOC_FAILED", "can't allocate memory")
"""What drivers, BLAS libraries and the CPU's allocator say, of which torch makes a plain RuntimeError."""


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether it says that a device's memory ran out, which leaves the device as it was."""
    if isinstance(error, PolyaccelError):
        return isinstance(error, OutOfMemory)
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)


def typed(
    operator: str, error: Exception, args: Sequence[object], kwargs: Mapping[str, object], rank: int | None = None
) -> Exception:
    """An OperatorError with the operator, every operand by its argument's name, and the message of ``error``.

    OutOfMemory where the library says that memory ran out. The error itself where it is one of the contract's, or says
    that torch lacks an operator on this device.
    """
    if isinstance(error, PolyaccelError | NotImplementedError):
        return error
    if ran_out_of_memory(error):
        return OutOfMemory(f"operator {operator!r} found no room for its result: {error}")
    names = list(argument_names(operator))
    names += [f"argument {i}" for i in range(len(names), len(args))]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return OperatorError(operator, f"{type(error).__name__}: {error}", describe_operands(given), rank)


@functools.cache
def argument_names(operator: str) -> tuple[str, ...]:
    """The arguments of an operator or station in order; none for a name that the contract does not know."""
    from polyaccel.backend.stations import STATIONS
    from polyaccel.backend.vocabulary import OPERATORS

    spec = OPERATORS.get(operator) or STATIONS.get(operator)
    return () if spec is None else tuple(argument.name for argument in spec.arguments)
