"""What lives on a device, and the check that the operands of one call live on the same.

Tensors say where they are; a weight, a cache, a step and a sampling state are opaque to the core and say it here.
Founding case: an operator without a device guard read another GPU's memory (AutoAWQ, Mixtral on several GPUs).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass

import torch

from polyaccel.backend.errors import OperandInfo, OperatorError


class Placed:
    """Something on a device that is no tensor.

    Attributes:
        torch_device: where its memory is; None if it does not say: then it is not compared with the other operands.
    """

    torch_device: torch.device | None = None

    def operand(self, name: str) -> OperandInfo:
        """What an error says about it when it is the operand ``name``."""
        return OperandInfo(
            name=name, shape=(), stride=(), dtype=type(self).__name__, device=str(self.torch_device), contiguous=True
        )


def check_devices(
    operator: str, args: Sequence[object], kwargs: Mapping[str, object], names: Sequence[str], rank: int | None = None
) -> None:
    """Refuse operands of several devices before anything runs. Host-only.

    ``names``: of the positional arguments. Tensors inside a dataclass are named ``argument.field``. A device without
    an index is any device of its type.

    Raises:
        OperatorError: naming the first argument that is elsewhere, and describing all.
    """
    if _together(args) and not kwargs:
        return
    names = (*names, *(f"argument {i}" for i in range(len(names), len(args))))
    placed = _placed({**dict(zip(names, args, strict=False)), **kwargs})
    if len(placed) < 2:
        return
    device = _device_of(placed[0][1])
    assert device is not None
    for name, value in placed[1:]:
        other = _device_of(value)
        if other is not None and not _same(other, device):
            reason = f"{name} is on {other} but {placed[0][0]} is on {device}; move it there first"
            raise OperatorError(operator, reason, [_describe(n, v) for n, v in placed], rank)


def _together(args: Sequence[object]) -> bool:
    """Whether all are certainly on one device: the common case, at a fraction of what it costs to name them."""
    first: torch.device | None = None
    for value in args:
        device = _device_of(value)
        if device is None:
            # mypy takes object's own hash, which needs an instance, for that of the class.
            for name in _fields_of(type(value)):  # type: ignore[arg-type]
                part = getattr(value, name)
                if isinstance(part, torch.Tensor):
                    if first is None:
                        first = part.device
                    elif part.device != first:
                        return False
        elif first is None:
            first = device
        elif device != first:
            return False
    return True


@functools.cache
def _fields_of(kind: type) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind)) if is_dataclass(kind) else ()


def describe_operands(arguments: Mapping[str, object]) -> list[OperandInfo]:
    """Every argument that says where it is, tensors inside a dataclass included."""
    return [_describe(name, value) for name, value in _placed(arguments)]


def _placed(arguments: Mapping[str, object]) -> list[tuple[str, object]]:
    found: list[tuple[str, object]] = []
    for name, value in arguments.items():
        if _device_of(value) is not None:
            found.append((name, value))
        elif is_dataclass(value) and not isinstance(value, type):
            parts = ((f"{name}.{field.name}", getattr(value, field.name)) for field in fields(value))
            found += [(inner, part) for inner, part in parts if isinstance(part, torch.Tensor)]
    return found


def _device_of(value: object) -> torch.device | None:
    if isinstance(value, torch.Tensor):
        return value.device
    return value.torch_device if isinstance(value, Placed) else None


def _same(a: torch.device, b: torch.device) -> bool:
    return a == b or (a.type == b.type and (a.index is None or b.index is None))


def _describe(name: str, value: object) -> OperandInfo:
    if isinstance(value, torch.Tensor):
        return OperandInfo.of(name, value)
    assert isinstance(value, Placed)
    return value.operand(name)
