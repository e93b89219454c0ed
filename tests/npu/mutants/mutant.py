"""A mutant: the backend's sources with a small wrong edit (:mod:`tests.support.planted`), and what must find it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.npu.constraints.case import StationCase
from tests.support import planted
from tests.support.planted import Edit, environment

__all__ = ["ByTest", "Edit", "Killer", "Mutant", "OnCard", "OnRanks", "environment", "misplaced", "plant"]

PACKAGE = "polyaccel_npu"


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


def misplaced(edits: Sequence[Edit]) -> list[str]:
    """Edits that do not fit the sources as they are."""
    return planted.misplaced(PACKAGE, edits)


def plant(edits: Sequence[Edit], folder: Path) -> None:
    """The package with the edits in ``folder``."""
    planted.plant(PACKAGE, edits, folder)
