"""What a call really executes, seen from outside of the backend by torch's dispatcher."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import torch

from polyaccel_conformance.harness.allocation import DENSE, OTHER, Allocations
from polyaccel_conformance.harness.dispatch import PlainDispatchMode
from polyaccel_conformance.harness.memory import Poison

Category = Literal["view", "allocate", "fill", "copy", "read", "compute"]

_VIEWS = frozenset({"aten::_unsafe_view", "aten::_reshape_alias", "aten::lift_fresh", "aten::lift", "aten::set_"})
_FILLS = frozenset(
    {
        "aten::zero_",
        "aten::fill_",
        "aten::zeros",
        "aten::zeros_like",
        "aten::new_zeros",
        "aten::ones",
        "aten::ones_like",
        "aten::new_ones",
        "aten::full",
        "aten::full_like",
        "aten::new_full",
        "aten::arange",
        "aten::scalar_tensor",
        "aten::resize_",
    }
)
_COPIES = frozenset({"aten::copy_", "aten::clone", "aten::_to_copy", "aten::_copy_from", "aten::_copy_from_and_resize"})
_READS = frozenset(
    {
        "aten::_local_scalar_dense",
        "aten::nonzero",
        "aten::nonzero_numpy",
        "aten::masked_select",
        "aten::equal",
        "aten::is_nonzero",
        "aten::_unique2",
        "aten::unique_consecutive",
        "aten::unique_dim",
    }
)


def category(operator: torch._ops.OpOverload) -> tuple[str, Category]:
    """Name without the overload, and what kind of work an operator is.

    Views, allocation, filling with a constant and copies in place are no arithmetic; reads make the host wait.
    """
    name = operator._schema.name
    if name in DENSE or name in OTHER:
        return name, "allocate"
    if name in _VIEWS or operator.is_view:
        return name, "view"
    if name in _FILLS:
        return name, "fill"
    if name in _COPIES:
        return name, "copy"
    return name, "read" if name in _READS else "compute"


def written(operator: torch._ops.OpOverload) -> tuple[tuple[int, str], ...]:
    """Position and name of the arguments that an operator writes to."""
    schema = operator._schema
    if not schema.is_mutable:
        return ()
    return tuple(
        (index, argument.name)
        for index, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


@functools.cache
def _described(operator: torch._ops.OpOverload) -> tuple[str, Category, tuple[tuple[int, str], ...], str]:
    """Name and category, what it writes, and its name with the overload: one look-up each time it is executed."""
    return *category(operator), written(operator), str(operator).replace(".", "::", 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Activity:
    """What was dispatched during one call and until the device was idle.

    Attributes:
        operators: compute operators by full name (``aten::mm.out`` as ``aten::mm``), with counts.
        overloads: the same by name and overload.
        operand_copies: whole copies of an operand, by argument; ``conversions``: those to another dtype.
        operand_writes: the first operator that wrote to an operand's memory, by argument.
        reads: operators that made the host wait for a value, while the call ran.
        crossings: copies from one device to another, while the call ran: ``"aten::_to_copy cuda:0 -> cpu"``.
        dispatched: everything but views, allocation included.
    """

    operators: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    overloads: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    operand_copies: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    conversions: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    operand_writes: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    reads: tuple[str, ...] = ()
    crossings: tuple[str, ...] = ()
    dispatched: int = 0


class Watch(PlainDispatchMode):
    """Records every operator that is dispatched, and poisons and guards new memory.

    ``storages``: address of each operand's buffer and the argument's name.
    """

    def __init__(self, poison: Poison, storages: Mapping[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.allocations = Allocations(poison)
        self._storages = storages
        self._operators: dict[str, int] = {}
        self._overloads: dict[str, int] = {}
        self._operand_copies: dict[str, int] = {}
        self._conversions: dict[str, int] = {}
        self._operand_writes: dict[str, str] = {}
        self._reads: list[str] = []
        self._crossings: list[str] = []
        self._dispatched = 0
        self._returned = False

    def returned(self) -> None:
        """The call has returned: what comes now is the device's queue, whose kernels may be Python here."""
        self._returned = True

    def activity(self, kernels: Sequence[str] = ()) -> Activity:
        """``kernels``: what the device says it ran beside what was dispatched."""
        operators = dict(self._operators)
        for kernel in kernels:
            operators[kernel] = operators.get(kernel, 0) + 1
        return Activity(
            operators=MappingProxyType(operators),
            overloads=MappingProxyType(dict(self._overloads)),
            operand_copies=MappingProxyType(dict(self._operand_copies)),
            conversions=MappingProxyType(dict(self._conversions)),
            operand_writes=MappingProxyType(dict(self._operand_writes)),
            reads=tuple(self._reads),
            crossings=tuple(self._crossings),
            dispatched=self._dispatched + len(kernels),
        )

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name, kind, writes, full = _described(func)
        named = kwargs or {}
        if kind == "view":
            return func(*args, **named)
        self._dispatched += 1
        if kind == "allocate":
            return self.allocations.new(name, lambda: func(*args, **named))
        for position, argument in writes:
            target = args[position] if position < len(args) else named.get(argument)
            operand = self._operand(target)
            if operand is not None:
                self._operand_writes.setdefault(operand, name)
        result = func(*args, **named)
        if kind == "compute":
            self._operators[name] = self._operators.get(name, 0) + 1
            self._overloads[full] = self._overloads.get(full, 0) + 1
        elif kind == "read" and not self._returned:
            self._reads.append(name)
        elif kind == "copy":
            self._copied(name, args, result)
        return result

    def _copied(self, name: str, args: tuple[Any, ...], result: torch.Tensor) -> None:
        source = args[1] if name == "aten::copy_" else args[0]
        if not isinstance(source, torch.Tensor):
            return
        if source.device != result.device and not self._returned:
            # A number on the host that becomes a tensor of no dimensions is an argument, not data.
            if source.dim() or result.device.type == "cpu":
                self._crossings.append(f"{name} {source.device} -> {result.device}")
            return
        operand = self._operand(source)
        if operand is not None:
            self._operand_copies[operand] = self._operand_copies.get(operand, 0) + 1
            if source.dtype != result.dtype:
                self._conversions[operand] = self._conversions.get(operand, 0) + 1

    def _operand(self, tensor: object) -> str | None:
        if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided or tensor.device.type == "meta":
            return None
        if not tensor.numel():
            # Memory of no bytes has no address of its own.
            return None
        return self._storages.get(tensor.untyped_storage().data_ptr())


def undeclared(activity: Activity, declared: Sequence[str]) -> list[str]:
    """Compute operators that no declaration names: by name, or by name and overload."""
    names = frozenset(declared)
    found = []
    for full in activity.overloads:
        name = full.rpartition(".")[0]
        if name not in names and full not in names and full.removesuffix(".default") not in names:
            found.append(name)
    return sorted(dict.fromkeys(found))
