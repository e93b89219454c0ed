"""A mutant of a source file: one expression replaced by another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["comparison", "offset", "arithmetic", "cast", "contiguous", "mask", "axes", "flag"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit:
    """Bytes ``start:end`` of a file replaced.

    Attributes:
        file: name inside the package.
        function: qualified name of the outermost function or method around it.
        kind: the rule that made it.
        line: where it begins, from 1; ``text`` is that line without its indentation.
        first, last: lines of the statement around it, without the body of a compound one.
        before, after: what is replaced, and by what.
        occurrence: among equal replacements in equal lines of the function, from 0.
    """

    file: str
    function: str
    kind: Kind
    line: int
    text: str
    first: int
    last: int
    start: int
    end: int
    before: str
    after: str
    occurrence: int = 0

    @property
    def key(self) -> str:
        """Names it as long as its own line is not edited, wherever that moves to inside its function."""
        return key_of(self.file, self.function, self.text, self.before, self.after, self.occurrence)

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}"

    def apply(self, source: bytes) -> bytes:
        """The mutated source. Raises ValueError for one that the edit does not belong to."""
        if source[self.start : self.end].decode() != self.before:
            raise ValueError(f"{self.where} does not read {self.before!r}")
        return source[: self.start] + self.after.encode() + source[self.end :]


def key_of(file: str, function: str, text: str, before: str, after: str, occurrence: int) -> str:
    """What :attr:`Edit.key` is for an edit of these attributes."""
    return " | ".join((file, function, text, before, after, str(occurrence)))


def file_of(key: str) -> str:
    """The file that an :attr:`Edit.key` names."""
    return key.partition(" | ")[0]
