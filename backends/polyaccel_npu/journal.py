"""What was called since the last wait for the device, as descriptions that another process can repeat.

A replay repeats shapes, strides, offsets, dtypes and attributes, not values: floats become ones and integers zeros. It
finds the call that CANN refuses, not one that fails for the numbers in it.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

KEPT = 4096
"""Calls that are remembered: more than a step of any model makes."""


@dataclass(frozen=True, slots=True)
class Called:
    """One call: what it counted as, torch's name of the operator, and its arguments as JSON."""

    kernel: str
    operator: str
    arguments: str


class Journal:
    """The calls of one backend instance since :meth:`clear`; the oldest are forgotten first."""

    def __init__(self, kept: int = KEPT) -> None:
        self.calls: deque[Called] = deque(maxlen=kept)

    def note(self, kernel: str, fn: Callable[..., object], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Remember a call of one of torch's operators; other functions are made of those and have none of their own."""
        operator = operator_name(fn)
        if operator:
            described = json.dumps([[describe(x) for x in args], {k: describe(v) for k, v in kwargs.items()}])
            self.calls.append(Called(kernel, operator, described))

    def clear(self) -> None:
        self.calls.clear()

    def dump(self) -> str:
        """One JSON line a call."""
        return "\n".join(json.dumps([c.kernel, c.operator, c.arguments]) for c in self.calls)


def load(text: str) -> list[Called]:
    """The inverse of :meth:`Journal.dump`."""
    return [Called(*json.loads(line)) for line in text.splitlines() if line]


def operator_name(fn: Callable[..., object]) -> str:
    """``namespace.name`` of an operator of torch.ops; empty for anything else."""
    if isinstance(fn, torch._ops.OpOverloadPacket):
        return str(fn._qualified_op_name).replace("::", ".")
    if isinstance(fn, torch._ops.OpOverload):
        return str(fn.overloadpacket._qualified_op_name).replace("::", ".")
    return ""


def describe(value: Any) -> Any:
    """A value as JSON: tensors by shape, stride, offset, dtype and kind of device."""
    if isinstance(value, torch.Tensor):
        return {
            "tensor": list(value.shape),
            "stride": list(value.stride()),
            "offset": value.storage_offset(),
            "dtype": str(value.dtype).removeprefix("torch."),
            "device": value.device.type,
        }
    if isinstance(value, torch.dtype):
        return {"torch": str(value).removeprefix("torch.")}
    if isinstance(value, list | tuple):
        return [describe(x) for x in value]
    return value


def rebuild(value: Any, device: torch.device) -> Any:
    """The inverse of :func:`describe`, with ones and zeros for values."""
    if isinstance(value, dict) and "tensor" in value:
        dtype = getattr(torch, value["dtype"])
        shape, stride, offset = value["tensor"], value["stride"], value["offset"]
        extent = offset + 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if all(shape) else offset
        fill = torch.ones if dtype.is_floating_point else torch.zeros
        storage = fill(max(extent, 1), dtype=dtype, device=device if value["device"] == "npu" else "cpu")
        return storage.as_strided(shape, stride, offset)
    if isinstance(value, dict) and "torch" in value:
        return getattr(torch, value["torch"])
    if isinstance(value, list):
        return [rebuild(x, device) for x in value]
    return value
