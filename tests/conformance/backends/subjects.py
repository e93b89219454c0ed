"""A backend that supports nothing: it must not pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from polyaccel.backend import Availability, Backend, Device, Entry, OperatorError, Query, TorchDevice
from polyaccel.backend.backend import Implementations


class Nothing(Backend):
    """Has a device, refuses every operator, and lets nothing run in its place."""

    name = "nothing"
    priority = None

    def probe(self) -> Availability:
        return Availability(usable=True, devices=("nothing:0",))

    def devices(self) -> Sequence[Device]:
        return (TorchDevice("cpu", name="nothing:0"),)

    def operators(self) -> Mapping[str, Implementations]:
        return {name: Entry(_never, supports=_refuses) for name in ("linear", "dequantize", *super().composites())}

    def composites(self) -> Mapping[str, Callable[..., object]]:
        return {}


def _refuses(query: Query) -> list[str]:
    return [f"this backend does not support {query.operator}"]


def _never(*operands: object) -> object:
    raise OperatorError("nothing", "no operator is supported")
