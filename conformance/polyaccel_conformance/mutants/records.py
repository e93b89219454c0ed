"""What is known of every mutant, kept in a JSON file so that one mutant can be run again without the others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from polyaccel_conformance.errors import UsageError
from polyaccel_conformance.mutants.mutant import Mutant
from polyaccel_conformance.mutants.score import Score
from polyaccel_conformance.results import encode


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """All runs of one mutant.

    Attributes:
        mark: names the mutant's definition; another mark makes the record stale.
        hunt: the run that its check ends; None where there was none yet, as below.
        full: every check on every case.
        uniform: uniformly drawn cases.
        seeds: runs on drawn cases alone, by seed.
    """

    mark: str
    hunt: Score | None = None
    full: Score | None = None
    uniform: Score | None = None
    seeds: Mapping[str, Score] = field(default_factory=dict)


def mark_of(mutant: Mutant) -> str:
    """What :attr:`Record.mark` is for this mutant."""
    text = "|".join(
        (
            mutant.name,
            mutant.what,
            mutant.check,
            mutant.host,
            str(mutant.devices),
            *mutant.operators,
        )
    )
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class Records:
    """The records in a file, written after each change. ``hosts``: runs of healthy code by name."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.mutants: dict[str, Record] = {}
        self.hosts: dict[str, Score] = {}
        if path is not None and path.exists():
            self._read(path)

    def of(self, mutant: Mutant) -> Record:
        """The mutant's record; an empty one where there is none, or a stale one."""
        found = self.mutants.get(mutant.name)
        mark = mark_of(mutant)
        return found if found is not None and found.mark == mark else Record(mark=mark)

    def update(self, mutant: Mutant, **runs: Any) -> Record:
        """Set fields of the mutant's record."""
        self._refresh()
        record = self.mutants[mutant.name] = replace(self.of(mutant), **runs)
        self._write()
        return record

    def host(self, name: str, score: Score) -> None:
        self._refresh()
        self.hosts[name] = score
        self._write()

    def keep(self, names: Mapping[str, object]) -> None:
        """Drop the records of mutants that are no more."""
        self.mutants = {name: self.mutants[name] for name in names if name in self.mutants}
        # What is only dropped here would be read back before the next change.
        self._write()

    def _write(self) -> None:
        if self._path is None:
            return
        # A mutant a line, so that a change shows what it is of.
        parts = [
            f'"{kind}": {{\n' + ",\n".join(f'"{name}": {json.dumps(encode(item))}' for name, item in found) + "\n}"
            for kind, found in (("mutants", sorted(self.mutants.items())), ("hosts", sorted(self.hosts.items())))
        ]
        self._path.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")

    def _refresh(self) -> None:
        """What another series has written meanwhile stays."""
        if self._path is not None and self._path.exists():
            self._read(self._path)

    def _read(self, path: Path) -> None:
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            self.mutants = {name: _record(item) for name, item in value["mutants"].items()}
            self.hosts = {name: _score(item) for name, item in value["hosts"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{path} holds no records of mutants: {error}") from error


def _record(value: Mapping[str, Any]) -> Record:
    one = {name: None if value[name] is None else _score(value[name]) for name in ("hunt", "full", "uniform")}
    return Record(mark=value["mark"], seeds={seed: _score(score) for seed, score in value["seeds"].items()}, **one)


def _score(value: Mapping[str, Any]) -> Score:
    return Score(**{**value, "asked": tuple(value["asked"])})
