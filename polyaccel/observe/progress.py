"""Progress bars for loading and generation, on stderr and only where a person is watching."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

if TYPE_CHECKING:
    from tqdm import tqdm


class ProgressBar:
    """A bar that is told (done, total). Shows nothing when stderr is not a terminal or ``enabled`` is false."""

    def __init__(self, label: str, *, unit: Literal["B", "answers"], enabled: bool = True) -> None:
        self._label, self._unit = label, unit
        self._enabled = enabled and sys.stderr.isatty()
        self._bar: tqdm[None] | None = None

    def __call__(self, done: int, total: int) -> None:
        if not self._enabled:
            return
        if self._bar is None:
            from tqdm import tqdm

            is_bytes = self._unit == "B"
            self._bar = tqdm(
                total=total,
                desc=self._label,
                unit=self._unit,
                unit_scale=is_bytes,
                unit_divisor=1024 if is_bytes else 1000,
                leave=False,
            )
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
