"""Hashes of what a certificate is about: the contract, the suite, the core's forms, and the backend's source."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import polyaccel.backend
from polyaccel.backend import API_VERSION, OPERATORS, STATIONS, Backend, OperatorSpec
from polyaccel.backend.levels import LEVELS

SUFFIXES = {".py", ".pyi", ".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp", ".so", ".toml"}


def contract_digest() -> str:
    """Of everything that the contract says: version, operators, stations, required tables. Not of its wording."""
    content = {
        "version": list(API_VERSION),
        "operators": [_spec(spec) for spec in (*OPERATORS.values(), *STATIONS.values())],
        "levels": [_text(level) for level in LEVELS.values()],
    }
    return _digest(json.dumps(content, sort_keys=True).encode())


def _spec(spec: OperatorSpec) -> list[str]:
    return [spec.name, *map(_text, spec.arguments), _text(spec.numerics), str(spec.mandatory), ",".join(spec.parts)]


def _text(value: Any) -> str:
    # A repr says more than the value; JSON of the fields does not.
    return json.dumps(_plain(value), sort_keys=True)


def _plain(value: Any) -> Any:
    if hasattr(value, "__dataclass_fields__"):
        return {name: _plain(getattr(value, name)) for name in value.__dataclass_fields__}
    if hasattr(value, "items"):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value if isinstance(value, int | str | bool | None) else str(value)


def suite_digest() -> str:
    """Of the suite's own source."""
    return tree_digest(Path(__file__).resolve().parents[1])


def core_digest() -> str:
    """Of ``polyaccel.backend``: a backend runs on its composites and storage classes, so they were tested too."""
    return tree_digest(Path(str(polyaccel.backend.__file__)).parent)


def backend_digest(backend: Backend) -> str:
    """Of the distribution's source: the package, or the single module, in which the backend's class is defined."""
    return tree_digest(source_of(backend))


def source_of(backend: Backend) -> Path:
    """The folder or file that holds the backend's source."""
    name = type(backend).__module__
    if name.split(".")[0] == "polyaccel":
        # The core's own backends: their folder; all else of the core has a hash of its own.
        return Path(str(sys.modules[name].__file__)).parent
    top = sys.modules[name.split(".")[0]]
    file = Path(str(getattr(top, "__file__", None) or sys.modules[name].__file__))
    return file.parent if file.name == "__init__.py" else file


def tree_digest(place: Path) -> str:
    """Of a file, or of every source file below a folder with its relative name; independent of order and time."""
    if place.is_file():
        return _digest(place.read_bytes())
    hasher = hashlib.sha256()
    for path in sorted(_sources(place), key=lambda p: p.relative_to(place).as_posix()):
        hasher.update(path.relative_to(place).as_posix().encode() + b"\0")
        hasher.update(hashlib.sha256(path.read_bytes()).digest())
    return hasher.hexdigest()[:32]


def _sources(place: Path) -> Iterable[Path]:
    return (path for path in place.rglob("*") if path.suffix in SUFFIXES and "__pycache__" not in path.parts)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]
