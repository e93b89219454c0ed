"""The results log: one JSON object a line, appended while a run goes on, read to take it up again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from polyaccel_conformance.check import CaseResult
from polyaccel_conformance.errors import UsageError
from polyaccel_conformance.grouping import Key, key_of
from polyaccel_conformance.multi.identity import RankIdentity
from polyaccel_conformance.results import (
    FailureGroup,
    Phase,
    RunHeader,
    encode,
    group_from_json,
    header_from_json,
    result_from_json,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Logged:
    """What a log holds. ``ended``: the run came to its end; ``groups``: failures with their minimal
    cases; ``identities``: who the ranks of each world were."""

    header: RunHeader
    results: tuple[tuple[Phase, CaseResult], ...]
    controls: Mapping[str, str]
    ended: bool
    groups: tuple[FailureGroup, ...] = ()
    identities: tuple[RankIdentity, ...] = ()


class ResultsLog:
    """Appends lines. With ``path`` None nothing is kept."""

    def __init__(self, path: Path | None, *, resume: bool = False) -> None:
        self._file = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            if resume:
                _drop_partial_line(path)
            self._file = path.open("a" if resume else "w", encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def write(self, kind: str, value: Any) -> None:
        if self._file is not None:
            self._file.write(json.dumps({"type": kind, **encode(value)}) + "\n")

    def header(self, header: RunHeader) -> None:
        self.write("run", header)
        self.flush()

    def case(self, phase: Phase, result: CaseResult) -> None:
        self.write("case", {**encode(result), "phase": phase})

    def flush(self) -> None:
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def read_log(path: Path) -> Logged:
    """A log as far as it was written; a last line that was cut off is left out.

    Raises:
        UsageError: no such file, or it is no results log.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    return parse_log(data, str(path))


def parse_log(data: bytes, name: str) -> Logged:
    """The same from memory; ``name`` is what messages call it.

    Raises:
        UsageError: it is no results log.
    """
    header: RunHeader | None = None
    results: dict[str, tuple[Phase, CaseResult]] = {}
    controls: dict[str, str] = {}
    groups: dict[Key, FailureGroup] = {}
    identities: dict[tuple[int, int], RankIdentity] = {}
    ended = False
    try:
        for number, line in _lines(data, name):
            kind = line.get("type")
            if kind == "run":
                header = header_from_json(line)
            elif kind == "case":
                result = result_from_json(line)
                results[result.case.key] = (line["phase"], result)
            elif kind == "rank":
                identity = RankIdentity(**{name: item for name, item in line.items() if name != "type"})
                identities[identity.world_size, identity.rank] = identity
            elif kind == "control":
                controls[line["check"]] = line["control"]
            elif kind == "failure":
                group = group_from_json({name: item for name, item in line.items() if name != "type"})
                groups[key_of(group.operator, group.failure)] = group
            elif kind == "end":
                ended = True
            if header is None:
                raise UsageError(f"{name} line {number} is not the first of a results log")
    except (KeyError, ValueError, TypeError) as error:
        raise UsageError(f"{name} is not a results log: {type(error).__name__}: {error}") from error
    if header is None:
        raise UsageError(f"{name} is empty")
    return Logged(
        header=header,
        results=tuple(results.values()),
        controls=controls,
        ended=ended,
        groups=tuple(groups.values()),
        identities=tuple(identities[key] for key in sorted(identities)),
    )


def _lines(data: bytes, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    lines = data.split(b"\n")
    # What follows the last newline was not finished.
    for number, line in enumerate(lines[:-1], 1):
        value = json.loads(line)
        if not isinstance(value, dict):
            raise UsageError(f"{name} line {number} is not an object")
        yield number, value


def _drop_partial_line(path: Path) -> None:
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) != len(data):
        path.write_bytes(whole)
