"""A mutant: a host backend, or the engine around it, with one thing wrong, and the check that must find it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from polyaccel.backend import Backend, Entry
from polyaccel_conformance.harness.overlay import Overlay

Function = Callable[..., Any]
Wrap = Callable[[Function], Function]
Host = Literal["cpu", "simulated"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """One planted bug.

    Attributes:
        name: ``<group>.<what is wrong>``.
        what: the bug in a sentence.
        operators: operators and questions that it changes; the cases of these are run against it.
        check: the check that must fail.
        apply: from the host to the mutant. Name, plan and declarations stay the host's, unless they are the bug.
        narrow: it shows in less than one of twenty uniformly drawn cases.
        host: the backend that it is planted in.
        devices: ranks at most.
        engine: the bug is in the engine, in the process that drives it; the backend stays as it is.
        portable: it is written with plain torch operators on any device, so that any backend can be its host.
    """

    name: str
    what: str
    operators: tuple[str, ...]
    check: str
    apply: Callable[[Backend], Backend]
    narrow: bool = False
    host: Host = "cpu"
    devices: int = 1
    engine: bool = False
    portable: bool = False


@functools.cache
def _anything() -> tuple[str, ...]:
    """Every operator of torch."""
    names = {name.partition(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    return tuple(sorted(name for name in names if name.startswith("aten::")))


class Altered(Overlay):
    """A host whose ``operators`` pass through ``wrap``, whether they are its own or composites."""

    def __init__(self, inner: Backend, wraps: Mapping[str, Wrap]) -> None:
        changed = {
            name: [
                # What a bug is written with must not betray it.
                replace(entry, fn=wrap(entry.fn), evidence=(*entry.evidence, *_anything()))
                for entry in inner.table()[name]
            ]
            for name, wrap in wraps.items()
            if name in inner.table()
        }
        super().__init__(inner, changed)
        self._wraps = dict(wraps)

    def composites(self) -> Mapping[str, Function]:
        found = dict(super().composites())
        return {name: self._wraps[name](fn) if name in self._wraps else fn for name, fn in found.items()}


def mutant(name: str, what: str, check: str, *, narrow: bool = False, portable: bool = False, **wraps: Wrap) -> Mutant:
    """A mutant whose operators, named by keyword, are wrong in themselves."""
    return Mutant(
        name=name,
        what=what,
        operators=tuple(wraps),
        check=check,
        apply=lambda inner: Altered(inner, wraps),
        narrow=narrow,
        portable=portable,
    )


def redeclared(operator: str, **fields: Any) -> Callable[[Backend], Backend]:
    """``apply`` of a mutant whose operator is right and whose entries say otherwise."""
    return lambda inner: _entries(inner, operator, lambda entry: replace(entry, **fields))


def undisguised(inner: Backend, operator: str, wrap: Wrap) -> Backend:
    """A host with something around one operator, whose evidence stays what the host declares."""
    return _entries(inner, operator, lambda entry: replace(entry, fn=wrap(entry.fn)))


def _entries(inner: Backend, operator: str, change: Callable[[Entry], Entry]) -> Backend:
    return Overlay(inner, {operator: [change(entry) for entry in inner.table()[operator]]})


def changed(made: Any, **members: Any) -> Any:
    """An object of a class of its own, which has these methods and properties beside those it had."""
    kind = type(made)
    made.__class__ = type(kind.__name__, (kind,), members)
    return made
