"""A run's log as a bundle keeps it: a quarter of the size, and enough to check every figure and every input."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

INPUTS = "inputs"
"""The one entry of a case's ``digests`` in a bundle."""
HEADROOM_DIGITS = 4
SECONDS_DIGITS = 3


def condensed(log: bytes) -> bytes:
    """JSON Lines with one hash of all inputs of a case, and its figures rounded; other lines are as they were.

    What was cut off at the end of the log is left out. Condensing twice changes nothing more.

    Raises:
        ValueError: not JSON Lines.
    """
    # What follows the last newline was not finished.
    lines = log.decode().split("\n")[:-1]
    return "".join(json.dumps(_line(json.loads(line)), separators=(",", ":")) + "\n" for line in lines).encode()


def _line(value: dict[str, Any]) -> dict[str, Any]:
    if value["type"] == "failure":
        # Where its case file lies is of no use elsewhere.
        return {**value, "path": value["path"].rpartition("/")[2]}
    if value["type"] != "case":
        return value
    headroom = {name: _rounded(worst, HEADROOM_DIGITS) for name, worst in value["headroom"].items()}
    return {
        **value,
        "digests": of_inputs(value["digests"]),
        "headroom": headroom,
        "seconds": _rounded(value["seconds"], SECONDS_DIGITS),
        "cpu": _rounded(value.get("cpu", 0.0), SECONDS_DIGITS),
    }


def of_inputs(digests: Mapping[str, str]) -> dict[str, str]:
    """One hash of the hashes of a case's operands, under :data:`INPUTS`; nothing of nothing."""
    if not digests or set(digests) == {INPUTS}:
        return dict(digests)
    text = "".join(f"{name}={digest}\n" for name, digest in sorted(digests.items()))
    return {INPUTS: hashlib.sha256(text.encode()).hexdigest()[:32]}


def _rounded(value: float | str, digits: int) -> float | str:
    # Infinity and NaN are words in a log.
    return value if isinstance(value, str) else float(f"{value:.{digits}g}")
