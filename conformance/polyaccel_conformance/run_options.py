"""What a run is asked for, and who watches it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from polyaccel_conformance.case import Case
from polyaccel_conformance.results import FailureGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What to run, and how.

    Attributes:
        profile: name of a profile; ``seed``: of the drawn cases, None for the profile's way.
        operators, checks: names, empty for all; ``selection``: a ``-k`` expression.
        devices: ranks at most; ``device``: index of the one for single-rank cases.
        workers: processes.
        timeout: seconds after which a case counts as hanging, None for the profile's.
        budget: seconds after which no further case is begun; such a run can be taken up again.
        folder: for the results log and case files, None to write nothing.
        resume: take up the log in the folder; ``failed``: only the cases that failed in it.
        stop_at: end at the first failure of this check.
        shrink: make failing cases minimal.
        corpus: run the fixed lists; without them only drawn cases, and all of sets that have but a few.
        given: these cases in place of all others.
        controls: ask every check's control; without them no check is conclusive.
    """

    profile: str = "default"
    seed: int | None = None
    operators: tuple[str, ...] = ()
    checks: tuple[str, ...] = ()
    selection: str = ""
    devices: int = 1
    device: int = 0
    workers: int = 2
    timeout: float | None = None
    budget: float | None = None
    folder: Path | None = None
    resume: bool = False
    failed: bool = False
    stop_at: str = ""
    shrink: bool = True
    corpus: bool = True
    given: tuple[Case, ...] = ()
    controls: bool = True


class Watch(Protocol):
    """Who wants to know while it runs."""

    def progress(self, done: int, expected: int, failed: int, now: str) -> None: ...

    def failure(self, group: FailureGroup) -> None: ...


class Silent:
    """Nobody watches."""

    def progress(self, done: int, expected: int, failed: int, now: str) -> None:
        return None

    def failure(self, group: FailureGroup) -> None:
        return None
