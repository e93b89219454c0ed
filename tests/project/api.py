"""Renders a package's public names and signatures as text, for the snapshot that makes every change deliberate."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import re
from types import ModuleType

ADDRESS = re.compile(r" at 0x[0-9a-f]+")
# Special methods that are part of how a class is used.
SPECIAL = frozenset(
    ("__init__", "__enter__", "__exit__", "__aenter__", "__aexit__", "__iter__", "__next__", "__len__", "__getitem__")
)


def render(package: ModuleType) -> str:
    """One paragraph a name of ``package.__all__``, in alphabetical order."""
    return "\n".join(_object(name, getattr(package, name)) for name in sorted(package.__all__)) + "\n"


def _object(name: str, value: object) -> str:
    if inspect.isclass(value):
        bases = ", ".join(base.__name__ for base in value.__bases__ if base is not object)
        return "\n    ".join([f"class {name}({bases})" if bases else f"class {name}", *_members(value)])
    if inspect.isfunction(value):
        return _function(name, value)
    shown = repr(value) if isinstance(value, bool | int | float | str | tuple) else "..."
    return f"{name}: {type(value).__name__} = {shown}"


def _members(cls: type) -> list[str]:
    if issubclass(cls, enum.Enum):
        return [f"{member.name} = {member.value!r}" for member in cls]
    found: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        if not owner.__module__.startswith("polyaccel"):
            continue
        # The fields of a dataclass are the arguments of its constructor.
        if not dataclasses.is_dataclass(owner):
            found.update((n, f"{n}: {note}") for n, note in inspect.get_annotations(owner).items() if n[0] != "_")
        found.update((n, line) for n, value in vars(owner).items() if (line := _member(n, value)))
    return [found[name] for name in sorted(found)]


def _member(name: str, value: object) -> str:
    if name.startswith("_") and name not in SPECIAL:
        return ""
    if isinstance(value, property):
        return f"property {name}{_signature(value.fget).partition(')')[2]}"
    if isinstance(value, classmethod | staticmethod):
        return f"{type(value).__name__} {_function(name, value.__func__)}"
    # Protocols get a constructor from typing.
    ours = inspect.isfunction(value) and (value.__module__ or "").startswith("polyaccel")
    return _function(name, value) if ours else ""


def _function(name: str, function: object) -> str:
    return f"{'async ' if inspect.iscoroutinefunction(function) else ''}def {name}{_signature(function)}"


def _signature(function: object) -> str:
    assert callable(function)
    # Annotations that were not evaluated are strings, which a signature shows in quotes.
    return ADDRESS.sub("", re.sub(r"(?<=: |> )'([^']*)'", r"\1", str(inspect.signature(function))))
