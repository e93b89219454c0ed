"""Chips and CANN versions that can be imitated."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from functools import total_ordering

from .errors import SettingError


class Chip(enum.Enum):
    """Families as the operator documents name them."""

    A2 = "910B"
    """Atlas A2 training and Atlas 800I A2 inference products."""
    A3 = "A3"
    """Atlas A3 training and inference products (SoC names 910_93xx)."""
    P310 = "310P"
    """Atlas inference products: 300I Duo, 300I Pro, 300V."""


@dataclass(frozen=True)
class Soc:
    """One chip as the runtime describes it.

    Attributes:
        name: what ``aclrtGetSocName`` returns.
        cube_cores, vector_cores: what ``aclGetDeviceCapability`` returns.
        bfloat16: whether the chip computes in it (310P does not).
        memory: bytes of device memory.
    """

    name: str
    chip: Chip
    cube_cores: int
    vector_cores: int
    bfloat16: bool
    memory: int


_GIB = 1 << 30
_KNOWN = (
    Soc("Ascend910B1", Chip.A2, 24, 48, True, 64 * _GIB),
    Soc("Ascend910B2", Chip.A2, 24, 48, True, 64 * _GIB),
    Soc("Ascend910B3", Chip.A2, 20, 40, True, 64 * _GIB),
    Soc("Ascend910B4", Chip.A2, 20, 40, True, 32 * _GIB),
    Soc("Ascend910_9392", Chip.A3, 24, 48, True, 64 * _GIB),
    Soc("Ascend910_9382", Chip.A3, 24, 48, True, 64 * _GIB),
    Soc("Ascend310P3", Chip.P310, 8, 7, False, 24 * _GIB),
)
_FAMILY = {
    "910B": "Ascend910B3",
    "A2": "Ascend910B3",
    "A3": "Ascend910_9392",
    "910_93": "Ascend910_9392",
    "310P": "Ascend310P3",
}


def find_soc(name: str) -> Soc:
    """A chip by its SoC name or its family.

    Raises:
        SettingError: it is not known.
    """
    wanted = _FAMILY.get(name, name)
    for soc in _KNOWN:
        if wanted in (soc.name, soc.name.removeprefix("Ascend")):
            return soc
    known = ", ".join([*_FAMILY, *(soc.name for soc in _KNOWN)])
    raise SettingError(f"CANNSIM_SOC={name}: no such chip; known are {known}")


_VERSION = re.compile(r"(\d+)\.(\d+)\.(?:RC(\d+)|(\d+))$", re.IGNORECASE)


@total_ordering
@dataclass(frozen=True)
class CannVersion:
    """``8.0.RC2`` comes before ``8.0.0``, and that before ``8.1.RC1``."""

    text: str

    @property
    def key(self) -> tuple[int, int, int, int]:
        """Major, minor, 0 for a release candidate and 1 for a release, its number."""
        match = _VERSION.match(self.text)
        if match is None:
            raise SettingError(f"CANN version {self.text!r}: expected the form 8.3.RC1 or 8.5.0")
        candidate = match[3]
        return int(match[1]), int(match[2]), candidate is None, int(candidate or match[4])

    @property
    def tells_itself(self) -> bool:
        """Whether it has the function that says its version (torch_npu 2.13: ``When the cann version is less than
        "8.1.RC1", GetCANNVersion is not supported``)."""
        return self.key >= (8, 1, 0, 1)

    def __lt__(self, other: CannVersion) -> bool:
        return self.key < other.key

    def __str__(self) -> str:
        return self.text
