"""What really ran: a count per kernel name, written where kernels are launched.

The ledger is the answer to "is the fast path taken?". Native code records through
:func:`polyaccel.backend.guard.launch`; composites record under ``composite.<operator>``; a captured graph holds the
delta of its capture and each replay adds it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

COMPOSITE_PREFIX = "composite."
NESTED_PREFIX = "nested_composite."
COPY_PREFIX = "copy."


class Ledger:
    """Counts of launches by kernel name, in order of first launch. One per worker; used by one thread at a time.

    ``launches`` only ever grows: it tells whether anything was recorded between two moments.
    """

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._native: list[str] = []
        self._depth = 0
        self.launches = 0
        self.strict = False

    # -- writing ---------------------------------------------------------------------------------------------------

    def record(self, kernel: str, count: int = 1) -> None:
        self._counts[kernel] = self._counts.get(kernel, 0) + count
        self.launches += count

    def add(self, delta: Mapping[str, int]) -> None:
        """Add a captured graph's launches, once for each replay."""
        for kernel, count in delta.items():
            self.record(kernel, count)

    @contextmanager
    def capture(self) -> Iterator[dict[str, int]]:
        """Collect the launches of the block into the yielded dict instead of counting them."""
        outer, self._counts = self._counts, {}
        delta: dict[str, int] = {}
        try:
            yield delta
        finally:
            delta.update(self._counts)
            self._counts = outer

    # -- operator calls --------------------------------------------------------------------------------------------

    def enter(self, native: str | None) -> None:
        """An operator call begins; ``native`` is its implementation's name, None for a composite or a station of
        parts."""
        self._depth += 1
        if native is not None:
            self._native.append(native)

    def leave(self, native: str | None) -> None:
        self._depth -= 1
        if native is not None:
            self._native.pop()

    @property
    def native(self) -> str | None:
        """The innermost native implementation being run, if any."""
        return self._native[-1] if self._native else None

    @property
    def inside_operator(self) -> bool:
        """Whether an operator call is in progress; compute outside of one breaks the contract."""
        return self._depth > 0

    # -- reading ---------------------------------------------------------------------------------------------------

    def counts(self) -> dict[str, int]:
        """A copy of all counts."""
        return dict(self._counts)

    def composites(self) -> dict[str, int]:
        return {k: n for k, n in self._counts.items() if k.startswith((COMPOSITE_PREFIX, NESTED_PREFIX))}

    def copies(self) -> dict[str, int]:
        """Copies made only to satisfy a layout, by ``copy.<operator>.<argument>``."""
        return {k: n for k, n in self._counts.items() if k.startswith(COPY_PREFIX)}

    def clear(self) -> None:
        self._counts.clear()
