"""A mutant: the backend's sources with a small wrong edit, and what must find it.

Name, plan and declarations stay the backend's own unless they are the bug. A mutant lives in a folder of its own,
before the true sources on the path of fresh processes.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.npu.constraints.case import StationCase

PACKAGE = "polyaccel_npu"


@dataclass(frozen=True)
class Edit:
    """``old``, which is in the file exactly once, becomes ``new``."""

    file: str
    old: str
    new: str


@dataclass(frozen=True)
class OnCard:
    """The suite's fixed cases of these operators on one card; ``checks`` of the suite, of which one must fail."""

    operators: tuple[str, ...]
    checks: tuple[str, ...] = ("values.exact", "values.bound")


@dataclass(frozen=True)
class OnRanks:
    """Calls of stations over ranks; ``fault``: how what is wrong with one must begin (see ``constraints.judge``).

    ``collectives``: each of them is called as well.
    """

    fault: str
    cases: tuple[StationCase, ...] = ()
    chip: str = "910B"
    world: int = 2
    collectives: bool = False


@dataclass(frozen=True)
class ByTest:
    """A test of this folder, by file and name."""

    test: str


Killer = OnCard | OnRanks | ByTest


@dataclass(frozen=True)
class Mutant:
    """One planted bug."""

    name: str
    what: str
    edits: tuple[Edit, ...]
    killer: Killer


def sources() -> Path:
    """Where the backend's true sources are."""
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def misplaced(edits: Sequence[Edit]) -> list[str]:
    """Edits that do not fit the sources as they are."""
    found = []
    for edit in edits:
        count = (sources() / edit.file).read_text(encoding="utf-8").count(edit.old)
        if count != 1:
            found.append(f"{edit.file}: {count} times {edit.old!r}")
    return found


def plant(edits: Sequence[Edit], folder: Path) -> None:
    """The package with the edits in ``folder``."""
    target = folder / PACKAGE
    shutil.copytree(sources(), target, ignore=shutil.ignore_patterns("__pycache__"))
    for edit in edits:
        path = target / edit.file
        text = path.read_text(encoding="utf-8")
        assert text.count(edit.old) == 1, f"{edit.file} holds {edit.old!r} {text.count(edit.old)} times"
        path.write_text(text.replace(edit.old, edit.new), encoding="utf-8")


def environment(folder: Path) -> Mapping[str, str]:
    """Variables of a process that finds the package of ``folder`` before any other."""
    rest = os.environ.get("PYTHONPATH", "")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), rest] if rest else [str(folder)])}
