"""A mutant in a running process, as every holder of the function sees it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from polyaccel_conformance.errors import UsageError
from polyaccel_conformance.mutation.edit import Edit
from polyaccel_conformance.mutation.install import install
from polyaccel_conformance.mutation.listing import edits_of

PACKAGE = "mutated_sample"
SOURCE = """
import functools
from dataclasses import dataclass


def above(x):
    return x > 3


def outer(x):
    def inner(y):
        return y + 1

    return inner(x)


@dataclass(frozen=True, slots=True)
class Box:
    width: int

    @property
    def wide(self):
        return self.width >= 10

    @classmethod
    def unit(cls):
        return cls(1)

    @functools.lru_cache
    def kept(self):
        return self.width + 1
"""


@pytest.fixture
def sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A package with one module, imported; gone afterwards."""
    import importlib
    import sys

    folder = tmp_path / PACKAGE
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "shapes.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield importlib.import_module(f"{PACKAGE}.shapes")
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        del sys.modules[name]


def edit(function: str, before: str, after: str) -> Edit:
    (found,) = (
        e
        for e in edits_of("shapes.py", SOURCE.encode())
        if (e.function, e.before, e.after) == (function, before, after)
    )
    return found


def test_whoever_imported_the_function_by_value_runs_the_mutant(sample: ModuleType) -> None:
    by_value = sample.above
    assert not by_value(3)
    install(edit("above", "x > 3", "x >= 3"), PACKAGE)
    assert by_value(3)


def test_nested_functions_properties_and_class_methods_are_reached(sample: ModuleType) -> None:
    box = sample.Box(10)
    install(edit("outer", "1", "2"), PACKAGE)
    install(edit("Box.wide", "self.width >= 10", "self.width > 10"), PACKAGE)
    install(edit("Box.unit", "1", "2"), PACKAGE)
    assert sample.outer(1) == 3
    assert not box.wide
    assert sample.Box.unit().width == 2


def test_the_source_file_is_not_written(sample: ModuleType) -> None:
    assert sample.__file__ is not None
    install(edit("above", "x > 3", "x >= 3"), PACKAGE)
    assert Path(sample.__file__).read_text() == SOURCE


def test_a_function_that_cannot_be_reached_is_an_error(sample: ModuleType) -> None:
    with pytest.raises(UsageError, match=r"0 functions Box\.kept"):
        install(edit("Box.kept", "1", "2"), PACKAGE)
