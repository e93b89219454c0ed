"""A dispatch mode under which nothing computes outside an operator call and nothing is read back from the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from polyaccel.backend.ledger import Ledger

ALLOCATIONS = frozenset({"aten::empty", "aten::empty_strided", "aten::new_empty", "aten::empty_like"})
READBACKS = frozenset({"aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal"})
# On the CPU these reach the host without a dispatched call.
HOST_METHODS = ("tolist", "numpy", "cpu", "__array__")


class Violation(AssertionError):
    """A dispatched call that the contract forbids."""


class OperatorsOnly(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses compute outside of operator calls, and readbacks and copies to the host everywhere.

    ``host`` is the device type that counts as the host; None where tensors live there anyway. ``outside`` counts what
    ran outside of operators, by name.
    """

    def __init__(self, ledger: Ledger, *, host: str | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._ledger = ledger
        self._host = host
        self.inside = 0
        self.outside: dict[str, int] = {}

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        name = func._schema.name
        if name in READBACKS:
            raise Violation(f"{name} reads from the device during a step")
        if self._ledger.inside_operator:
            self.inside += 1
        elif not _is_view(func) and name not in ALLOCATIONS:
            raise Violation(f"{name} computes outside of an operator call")
        else:
            self.outside[name] = self.outside.get(name, 0) + 1
        result = func(*args, **(kwargs or {}))
        if self._host is not None and isinstance(result, torch.Tensor) and result.device.type == self._host:
            raise Violation(f"{name} brings a tensor to the host during a step")
        return result


def _is_view(func: torch._ops.OpOverload) -> bool:
    aliases = [value.alias_info for value in func._schema.returns]
    return bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)


@contextmanager
def no_host_methods() -> Iterator[None]:
    """Tensor methods that hand values to Python raise inside the block, in every thread."""
    saved: dict[str, Callable[..., object]] = {name: getattr(torch.Tensor, name) for name in HOST_METHODS}

    def forbid(name: str) -> Callable[..., object]:
        def forbidden(*args: object, **kwargs: object) -> object:
            raise Violation(f"Tensor.{name} reads from the device during a step")

        return forbidden

    for name in HOST_METHODS:
        setattr(torch.Tensor, name, forbid(name))
    try:
        yield
    finally:
        for name, method in saved.items():
            setattr(torch.Tensor, name, method)
