"""Waivers: known failures that a vendor has written down, with a reason, a place to read on, and an end.

A file holds tables of one form::

    [[waiver]]
    test = "linear/values.bound/dtype=float16,dims.k=8192..16384"
    reason = "the accumulator of the first silicon revision has 22 bits"
    url = "https://github.com/acme/polyaccel-acme/issues/1"
    expires = 2027-03-31

``test`` is ``operator/check/axes``; operator and check are shell patterns, axes (``*`` for any) are conditions on the
case's axes by name, all of which must hold: a shell pattern, or a range of integers. One that has expired or matches
no failure makes the run fail, so that the file never outlives its reasons.
"""

from __future__ import annotations

import datetime
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from polyaccel_conformance.case import Case, Choice
from polyaccel_conformance.errors import UsageError

KEYS = ("test", "reason", "url", "expires")


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiver:
    """One table of the file. ``url`` leads to where the failure is discussed."""

    test: str
    reason: str
    url: str
    expires: datetime.date

    def covers(self, case: Case, check: str) -> bool:
        """Whether this failure is the one that was written down."""
        operator, name, axes = self.test.split("/", 2)
        if not (fnmatchcase(case.operator, operator) and fnmatchcase(check, name)):
            return False
        return holds(case, axes)

    def to_json(self) -> dict[str, str]:
        return {"test": self.test, "reason": self.reason, "url": self.url, "expires": self.expires.isoformat()}


def holds(case: Case, conditions: str) -> bool:
    """Whether a case's axes fulfil all of ``name=value,name=value``; ``*`` holds for any case."""
    return conditions == "*" or all(_fulfils(case.axes(), condition) for condition in conditions.split(","))


def _fulfils(axes: Mapping[str, Choice], condition: str) -> bool:
    name, _, pattern = condition.strip().partition("=")
    if name not in axes:
        return False
    value = axes[name]
    low, dots, high = pattern.partition("..")
    if dots and isinstance(value, int):
        return int(low) <= value <= int(high)
    return fnmatchcase(str(value), pattern)


def read_waivers(path: Path) -> tuple[Waiver, ...]:
    """The waivers of a TOML file.

    Raises:
        UsageError: not readable, not TOML, or a table lacks a key, has one too many or one of another form.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"waivers {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"waivers {path}: {error}") from error
    tables = content.get("waiver", [])
    if set(content) - {"waiver"} or not isinstance(tables, list):
        raise UsageError(f"waivers {path}: expected tables [[waiver]], found {sorted(content)}")
    return tuple(_waiver(path, number, table) for number, table in enumerate(tables, 1))


def _waiver(path: Path, number: int, table: object) -> Waiver:
    def refuse(reason: str) -> UsageError:
        return UsageError(f"waivers {path}: waiver {number} {reason}")

    if not isinstance(table, Mapping):
        raise refuse("is not a table")
    missing, extra = [key for key in KEYS if key not in table], sorted(set(table) - set(KEYS))
    if missing or extra:
        raise refuse(f"lacks {missing}" if missing else f"has unknown keys {extra}")
    test, reason, url, expires = (table[key] for key in KEYS)
    if not isinstance(test, str) or len(test.split("/", 2)) != 3:
        raise refuse(f"has test {test!r}, expected operator/check/axes with * for any")
    for condition in test.split("/", 2)[2].split(","):
        if condition != "*" and not all(condition.partition("=")):
            raise refuse(f"has condition {condition!r}, expected axis=value")
        low, dots, high = condition.partition("=")[2].partition("..")
        if dots and not (_is_integer(low) and _is_integer(high)):
            raise refuse(f"has range {low}..{high}, expected two integers")
    if not isinstance(reason, str) or not reason.strip():
        raise refuse("has no reason")
    if not isinstance(url, str) or not url.startswith(("https://", "http://")):
        raise refuse(f"has url {url!r}, expected an address")
    if isinstance(expires, datetime.datetime) or not isinstance(expires, datetime.date):
        raise refuse(f"has expires {expires!r}, expected a date such as 2027-03-31 without quotes")
    return Waiver(test=test, reason=reason, url=url, expires=expires)


def _is_integer(text: str) -> bool:
    return text.removeprefix("-").isdigit()


@dataclass(frozen=True, slots=True, kw_only=True)
class Applied:
    """What waivers did to the failures of a run.

    Attributes:
        covered: positions of the failures that some waiver covers.
        failures: how many there were.
        problems: sentences about waivers that have expired or cover nothing; one is enough to fail a run.
    """

    covered: frozenset[int]
    problems: tuple[str, ...]
    failures: int = 0

    @property
    def uncovered(self) -> int:
        return self.failures - len(self.covered)


def apply_waivers(waivers: Sequence[Waiver], failures: Iterable[tuple[Case, str]], today: datetime.date) -> Applied:
    """Match waivers with failures, each a case and the name of the check that failed. An expired waiver covers
    nothing."""
    covered: set[int] = set()
    position = -1
    used: set[int] = set()
    for position, (case, check) in enumerate(failures):
        for number, waiver in enumerate(waivers):
            if waiver.covers(case, check):
                used.add(number)
                if waiver.expires >= today:
                    covered.add(position)
    problems = []
    for number, waiver in enumerate(waivers):
        if waiver.expires < today:
            problems.append(f"waiver {waiver.test} expired on {waiver.expires.isoformat()}")
        elif number not in used:
            problems.append(f"waiver {waiver.test} matches no failure; remove it")
    return Applied(covered=frozenset(covered), problems=tuple(problems), failures=position + 1)
