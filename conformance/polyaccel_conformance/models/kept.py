"""What the reference says of the small models, kept in files: the workers of a run work it out once for all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from polyaccel_conformance.models.answers import Answer
from polyaccel_conformance.models.rounding import Rounding


class Kept:
    """Answers and roundings by what was asked, in a folder; in none if it is None. Two workers may work out the same at
    the same time: the files are the same then."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def answers(self, asked: object, compute: Callable[[], list[Answer]]) -> list[Answer]:
        path = self._path("answers", asked)
        if path is not None and path.exists():
            # JSON gives back every bit of a finite number, and knows the others by name.
            stored = json.loads(path.read_bytes())
            return [Answer(**{name: tuple(values) for name, values in answer.items()}) for answer in stored]
        found = compute()
        if path is not None:
            told = [{"tokens": a.tokens, "logprobs": a.logprobs, "margins": a.margins} for a in found]
            _write(path, json.dumps(told).encode())
        return found

    def rounding(self, asked: object, compute: Callable[[], Rounding]) -> Rounding:
        path = self._path("rounding", asked)
        if path is not None and path.exists():
            exact, tolerance = json.loads(path.read_bytes())
            return Rounding(exact=tuple(map(np.array, exact)), tolerance=tuple(map(np.array, tolerance)))
        found = compute()
        if path is not None:
            told = [[values.tolist() for values in part] for part in (found.exact, found.tolerance)]
            _write(path, json.dumps(told).encode())
        return found

    def _path(self, kind: str, asked: object) -> Path | None:
        if self._folder is None:
            return None
        return self._folder / f"{kind}-{hashlib.sha256(repr(asked).encode()).hexdigest()[:16]}.json"


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all."""
    own = path.with_suffix(f".{os.getpid()}")
    own.write_bytes(data)
    own.replace(path)
