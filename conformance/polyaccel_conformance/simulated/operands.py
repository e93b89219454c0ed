"""Refusing operands outside of the specification before anything is launched: a kernel would fail late and for good."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from polyaccel.backend import OPERATORS, OperatorError


def check_operands(
    operator: str, operands: Mapping[str, torch.Tensor | None], sizes: Mapping[str, int], rank: int | None
) -> None:
    """Dtypes, and shapes that agree in every dimension with the same name.

    ``sizes``: dimensions that are known from elsewhere, such as a weight's ``k`` and ``n``.

    Raises:
        OperatorError: names the argument.
    """
    spec = OPERATORS.get(operator)
    if spec is None:
        return
    tensors = {name: tensor for name, tensor in operands.items() if tensor is not None}
    known = dict(sizes)
    for argument in spec.arguments:
        tensor = tensors.get(argument.name)
        if tensor is None or argument.kind != "tensor":
            continue
        reason = None
        if argument.dtypes and tensor.dtype not in argument.dtypes:
            reason = f"dtype {tensor.dtype}, expected one of {', '.join(str(d) for d in argument.dtypes)}"
        reason = reason or _shape(argument.shape, tensor.shape, known)
        if reason is not None:
            raise OperatorError.describe(operator, f"argument {argument.name!r} has {reason}", tensors, rank)


def _shape(form: str, shape: torch.Size, known: dict[str, int]) -> str | None:
    """Why a shape does not fit ``[T, kv_heads, 2 n]``; what it says is added to ``known``."""
    names = [name.strip() for name in form.strip("[]").split(",")]
    sizes = list(shape)
    if names[0] == "...":
        names = names[1:]
        sizes = sizes[len(sizes) - len(names) :] if len(sizes) >= len(names) else sizes
    if len(sizes) != len(names):
        return f"shape {list(shape)}, expected {form}"
    for name, size in zip(names, sizes, strict=True):
        factor, _, symbol = name.rpartition(" ")
        times = int(factor) if factor else 1
        if size % times or known.setdefault(symbol, size // times) != size // times:
            return f"shape {list(shape)}, expected {form} with {symbol} = {known.get(symbol)}"
    return None
