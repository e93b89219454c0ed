"""Stop strings over streamed text."""

from __future__ import annotations

from collections.abc import Sequence

from polyaccel.backend.errors import RequestRejected


class StopStrings:
    """Watches one request's text for stop strings and holds back what may be the beginning of one.

    The match is the stop string that is complete first; of those complete at the same character, the longest. It
    depends on the text alone, never on how the text was cut into pushes. Nothing is emitted from a match on, except the
    stop string itself if ``include_stop``.

    Raises RequestRejected for stop strings that are empty or not strings.
    """

    def __init__(self, stops: Sequence[str], *, include_stop: bool = False) -> None:
        if isinstance(stops, str):
            raise RequestRejected(f"stop is the string {stops!r}, expected a sequence of strings")
        for stop in stops:
            if not (stop and isinstance(stop, str)):
                raise RequestRejected(f"stop strings must be non-empty strings, got {stop!r}")
        self._stops = tuple(dict.fromkeys(stops))
        self._include_stop = include_stop
        self._held = ""
        self._matched: str | None = None

    @property
    def matched(self) -> str | None:
        """The stop string that was found, or None."""
        return self._matched

    def push(self, text: str) -> tuple[str, str | None]:
        """Add text. Returns what is safe to emit and the stop string found, or None.

        After a match every push returns ("", the stop string).
        """
        if self._matched is not None:
            return "", self._matched
        buffer = self._held + text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := buffer.find(stop)) >= 0]
        if found:
            end, start, self._matched = min(found)
            self._held = ""
            return buffer[: end if self._include_stop else start], self._matched
        keep = self._longest_beginning(buffer)
        self._held = buffer[len(buffer) - keep :]
        return buffer[: len(buffer) - keep], None

    def finish(self) -> str:
        """What was held back, to be emitted when the text ends without a match; empty afterwards."""
        held, self._held = self._held, ""
        return held

    def _longest_beginning(self, buffer: str) -> int:
        longest = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(buffer)), longest, -1):
                if buffer.endswith(stop[:size]):
                    longest = size
                    break
        return longest
