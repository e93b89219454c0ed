"""A mutant in a running process: the code of the function is exchanged, so that everybody who holds it has it."""

from __future__ import annotations

import functools
import hashlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FunctionType, ModuleType

from polyaccel_conformance.errors import UsageError
from polyaccel_conformance.mutation.edit import Edit
from polyaccel_conformance.mutation.listing import edits_of

PACKAGE = "polyaccel.backend.composite"


def sources(package: str = PACKAGE) -> dict[str, Path]:
    """The package's own files by name, in alphabetical order."""
    folder = Path(importlib.import_module(package).__path__[0])
    return {path.name: path for path in sorted(folder.glob("*.py"))}


def digests(package: str = PACKAGE) -> dict[str, str]:
    """Names the state of each source file."""
    return {name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for name, path in sources(package).items()}


def edits_in(file: str, package: str = PACKAGE) -> tuple[Edit, ...]:
    """Every mutant of one of the package's files."""
    return edits_of(file, sources(package)[file].read_bytes())


def all_edits(package: str = PACKAGE) -> list[Edit]:
    """Every mutant of the package."""
    return [edit for name in sources(package) for edit in edits_in(name, package)]


def install(edit: Edit, package: str = PACKAGE) -> None:
    """Exchange the code of the edit's function in this process, for good. Nothing is written.

    Raises:
        UsageError: the module has no such function, or the mutated source does not compile.
    """
    path = sources(package)[edit.file]
    module = importlib.import_module(f"{package}.{path.stem}")
    try:
        compiled = compile(edit.apply(path.read_bytes()), str(path), "exec")
    except SyntaxError as error:
        raise UsageError(f"{edit.where}: {edit.before} -> {edit.after} does not compile: {error}") from error
    code = {c.co_qualname: c for c in _codes(compiled)}[edit.function]
    functions = [f for f in _functions(module) if f.__qualname__ == edit.function]
    if len(functions) != 1:
        raise UsageError(f"{edit.where}: {len(functions)} functions {edit.function} in {module.__name__}")
    functions[0].__code__ = code


def _codes(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _codes(constant)


def _functions(owner: ModuleType | type) -> Iterator[FunctionType]:
    """Functions and methods that a module or class itself defines."""
    name = owner.__name__ if isinstance(owner, ModuleType) else owner.__module__
    for value in list(vars(owner).values()):
        if isinstance(value, type) and value.__module__ == name:
            yield from _functions(value)
        function = _plain(value)
        if function is not None and function.__module__ == name:
            yield function


def _plain(value: object) -> FunctionType | None:
    if isinstance(value, property):
        value = value.fget
    elif isinstance(value, staticmethod | classmethod):
        value = value.__func__
    elif isinstance(value, functools.cached_property):
        value = value.func
    return value if isinstance(value, FunctionType) else None
