"""Reading JSON that nobody vouches for."""

from __future__ import annotations

import json
from pathlib import Path

from polyaccel.backend.errors import ModelLoadError, PolyaccelError

_MAX_BYTES = 64 << 20


def parse_json_object(data: bytes, what: str, error: type[PolyaccelError] = ModelLoadError) -> dict[str, object]:
    """Parse UTF-8 JSON whose top level is an object without duplicate keys, at any depth.

    ``what`` names the source in messages. Raises ``error`` for anything else, including nesting too deep to parse.
    """

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise error(f"{what}: the key {repeated[:200]!r} occurs twice")
        return result

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except UnicodeDecodeError as cause:
        raise error(f"{what}: not valid UTF-8 (byte {cause.start})") from cause
    except RecursionError as cause:
        raise error(f"{what}: JSON nested too deeply") from cause
    except ValueError as cause:
        raise error(f"{what}: not valid JSON ({str(cause)[:200]})") from cause
    if not isinstance(value, dict):
        raise error(f"{what}: the top level is {type(value).__name__}, expected an object")
    return value


def read_json_object(path: Path, error: type[PolyaccelError] = ModelLoadError) -> dict[str, object]:
    """Read and parse a JSON file of at most 64 MiB. Raises ``error`` naming the file."""
    try:
        size = path.stat().st_size
        if size > _MAX_BYTES:
            raise error(f"{path}: {size} bytes, more than the {_MAX_BYTES} that a JSON file may have here")
        data = path.read_bytes()
    except OSError as cause:
        raise error(f"{path}: cannot be read ({cause})") from cause
    return parse_json_object(data, str(path), error)
