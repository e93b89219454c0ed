"""Profiles: how many further cases are drawn, how large they may be, and on how many ranks. All run every check."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from polyaccel_conformance.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What is run beyond an operator's fixed list (covering and large cases), which every profile runs first.

    Attributes:
        examples: cases drawn for each operator; of several ranks fewer, see ``schedule.drawn``.
        scale: factor of the upper end of every size's range.
        fresh: the seed is new in every run unless one is given; it is recorded either way.
        timeout: seconds after which a case counts as hanging.
        shrink_seconds: at most for the minimal case of one group of failures.
    """

    name: str
    examples: int
    scale: float = 1.0
    fresh: bool = False
    timeout: float = 60.0
    shrink_seconds: float = 30.0


PROFILES: Mapping[str, Profile] = MappingProxyType(
    {
        profile.name: profile
        for profile in (
            Profile(name="quick", examples=25, scale=0.5),
            Profile(name="default", examples=200, scale=2),
            Profile(name="certify", examples=1000, scale=4, fresh=True),
            Profile(name="fuzz", examples=5000, scale=4, fresh=True),
        )
    }
)


def profile_of(name: str) -> Profile:
    """Raises UsageError for a name that is none."""
    if name not in PROFILES:
        raise UsageError(f"no profile {name!r}; there are {', '.join(PROFILES)}")
    return PROFILES[name]
