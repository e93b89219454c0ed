"""A progress line on a terminal; nothing anywhere else."""

from __future__ import annotations

import sys
import time
from typing import TextIO

WIDTH = 24
SECONDS = 0.1


class ProgressLine:
    """One line that is written over: done of expected, failures, what runs now."""

    def __init__(self, stream: TextIO | None = None, *, enabled: bool = True) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._enabled = enabled and self._stream.isatty()
        self._started = time.monotonic()
        self._last = 0.0
        self._length = 0

    def update(self, done: int, expected: int, failed: int, now: str) -> None:
        """Show where the run is, ten times a second at most."""
        moment = time.monotonic()
        if not self._enabled or (moment - self._last < SECONDS and done < expected):
            return
        self._last = moment
        filled = WIDTH * done // max(expected, 1)
        bar = "#" * filled + "-" * (WIDTH - filled)
        failures = f", {failed} failed" if failed else ""
        self._write(f"[{bar}] {done}/{expected}{failures}  {moment - self._started:.0f} s  {now}")

    def clear(self) -> None:
        """Remove the line, before something else is printed."""
        if self._enabled and self._length:
            self._stream.write("\r" + " " * self._length + "\r")
            self._stream.flush()
            self._length = 0

    def _write(self, text: str) -> None:
        self._stream.write("\r" + text + " " * max(self._length - len(text), 0))
        self._stream.flush()
        self._length = len(text)
