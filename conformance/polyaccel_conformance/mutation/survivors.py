"""Explained survivors: mutants that no case needs to tell from the original, and why."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from polyaccel_conformance.errors import UsageError
from polyaccel_conformance.mutation.campaign import Outcome
from polyaccel_conformance.mutation.edit import Edit, key_of

WHYS = ("equivalent", "unreachable", "speed", "wording", "permitted")
"""Nothing that can be computed differs; no caller gets there; only time or memory differ; only which error, or its
words; the contract permits either."""
REQUIRED = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """One mutant by what its :attr:`Edit.key` is made of. ``why`` is one of :data:`WHYS`, ``reason`` a sentence."""

    file: str
    function: str
    text: str
    before: str
    after: str
    why: str
    reason: str
    occurrence: int = 0

    @property
    def key(self) -> str:
        return key_of(self.file, self.function, self.text, self.before, self.after, self.occurrence)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a whole campaign comes to.

    Attributes:
        killed, run: mutants; ``rate`` is their ratio.
        unexplained: survivors without an entry.
        stale: entries whose mutant is killed or does not exist.
    """

    killed: int
    run: int
    unexplained: tuple[Edit, ...]
    stale: tuple[Explanation, ...]

    @property
    def rate(self) -> float:
        return self.killed / self.run if self.run else 0.0

    @property
    def passed(self) -> bool:
        return not self.unexplained and not self.stale and self.rate >= REQUIRED


def read_survivors(path: Path) -> tuple[Explanation, ...]:
    """The ``[[survivor]]`` entries of a TOML file.

    Raises:
        UsageError: an entry lacks something or says more than once why.
    """
    entries = tomllib.loads(path.read_text(encoding="utf-8")).get("survivor", [])
    found: dict[str, Explanation] = {}
    for entry in entries:
        try:
            explanation = Explanation(**entry)
        except TypeError as error:
            raise UsageError(f"{path}: {entry}: {error}") from error
        if explanation.why not in WHYS or not explanation.reason.strip():
            raise UsageError(f"{path}: {explanation.key}: why must be one of {', '.join(WHYS)}, with a reason")
        if explanation.key in found:
            raise UsageError(f"{path}: {explanation.key} is explained twice")
        found[explanation.key] = explanation
    return tuple(found.values())


def judge(edits: Sequence[Edit], outcomes: Mapping[str, Outcome], explained: Sequence[Explanation]) -> Verdict:
    """``edits`` are those that the campaign was to run; explanations of others are not looked at."""
    by_key = {edit.key: edit for edit in edits}
    survivors = {key for key in by_key if key in outcomes and not outcomes[key].killed}
    files = {edit.file for edit in edits}
    known = {explanation.key for explanation in explained}
    return Verdict(
        killed=sum(bool(outcomes[key].killed) for key in by_key if key in outcomes),
        run=sum(key in outcomes for key in by_key),
        unexplained=tuple(by_key[key] for key in by_key if key in survivors and key not in known),
        stale=tuple(e for e in explained if e.file in files and e.key not in survivors),
    )


def entry(edit: Edit) -> str:
    """A TOML entry for a survivor, to be completed by hand."""
    values = {
        "file": edit.file,
        "function": edit.function,
        "text": edit.text,
        "before": edit.before,
        "after": edit.after,
        "why": "",
        "reason": "",
    }
    lines = ["[[survivor]]", *(f"{name} = {_quoted(value)}" for name, value in values.items())]
    if edit.occurrence:
        lines.insert(-2, f"occurrence = {edit.occurrence}")
    return "\n".join(lines) + "\n"


def _quoted(value: str) -> str:
    if "\n" in value:
        return f"'''{value}'''"
    return f"'{value}'" if "'" not in value else '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
