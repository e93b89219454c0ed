"""The contract's version and how a plugin states which versions it works with.

A distribution lists its backend twice: in entry-point group ``polyaccel.backends`` (what to load) and in
``polyaccel.backend_api`` as ``name = "v1_0:v1_3"`` (an inclusive range, never loaded, read before anything is
imported). Within a major version the contract only grows: new operators and arguments arrive with a composite and a
default.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

API_VERSION: tuple[int, int] = (1, 0)

BACKENDS_GROUP = "polyaccel.backends"
API_GROUP = "polyaccel.backend_api"

_RANGE = re.compile(r"v(\d+)_(\d+):v(\d+)_(\d+)")


def format_version(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


@dataclass(frozen=True, slots=True)
class ApiRange:
    """Inclusive range of contract versions, e.g. ``v1_0:v1_3``."""

    low: tuple[int, int]
    high: tuple[int, int]

    @classmethod
    def parse(cls, text: str) -> ApiRange:
        """Parse ``v1_0:v1_3``.

        Raises:
            ValueError: the text has another form, or low is above high.
        """
        match = _RANGE.fullmatch(text.strip())
        if match is None:
            raise ValueError(f"API range {text!r} is not of the form 'v1_0:v1_3'")
        numbers = [int(group) for group in match.groups()]
        low, high = (numbers[0], numbers[1]), (numbers[2], numbers[3])
        if low > high:
            raise ValueError(f"API range {text!r} is empty: its low end is above its high end")
        return cls(low, high)

    def accepts(self, version: tuple[int, int]) -> bool:
        """Whether a core of this contract ``version`` may drive the plugin.

        A core newer than ``high`` within the same major is accepted: minors only add, with composites and defaults.
        """
        return self.low <= version and (version <= self.high or version[0] == self.high[0])

    def __str__(self) -> str:
        return f"v{self.low[0]}_{self.low[1]}:v{self.high[0]}_{self.high[1]}"
