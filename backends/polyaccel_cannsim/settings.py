"""What is simulated: read once from the environment, so that child processes see the same machine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .errors import ErrorText, SettingError
from .soc import CannVersion, Soc, find_soc

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
PACKAGES = ("polyaccel_cannsim.operators", "polyaccel_cannsim.hccl")
_STAMPED_SINCE = CannVersion("8.2.RC1")


@dataclass(frozen=True)
class Settings:
    """One simulated machine.

    Attributes:
        devices: number of cards.
        memory: bytes a card has.
        quiet_ms: a stream that got no new work for so many milliseconds runs although nobody waits; negative: never.
        poison: byte that fills fresh device memory, or None for zeros.
        rules: packages whose operators and collectives are exported.
        log: whether torch_npu's own log is printed.
        ledger: file that each process writes its calls to at its end, or None.
    """

    devices: int
    soc: Soc
    cann: CannVersion
    memory: int
    error_text: ErrorText
    quiet_ms: int = 50
    poison: int | None = None
    ledger: Path | None = None
    rules: tuple[str, ...] = PACKAGES
    log: bool = False

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Settings:
        """The machine that the variables ``CANNSIM_*`` describe; without any, eight 910B3 under CANN 8.3.RC1.

        Raises:
            SettingError: a value cannot work.
        """
        env = os.environ if environment is None else environment
        soc = find_soc(env.get("CANNSIM_SOC", "910B"))
        cann = CannVersion(env.get("CANNSIM_CANN", "8.3.RC1"))
        style = env.get("CANNSIM_ERROR_TEXT", "auto")
        if style == "auto":
            error_text = ErrorText.STAMPED if cann >= _STAMPED_SINCE else ErrorText.CLASSIC
        elif style in {one.value for one in ErrorText}:
            error_text = ErrorText(style)
        else:
            raise SettingError(f"CANNSIM_ERROR_TEXT={style}: expected auto, classic or stamped")
        poison = env.get("CANNSIM_POISON", "")
        ledger = env.get("CANNSIM_LEDGER", "")
        return cls(
            devices=_integer(env, "CANNSIM_DEVICES", 8, 1, 64),
            soc=soc,
            cann=cann,
            memory=_bytes(env.get("CANNSIM_MEMORY", ""), soc.memory),
            error_text=error_text,
            quiet_ms=_integer(env, "CANNSIM_QUIET_MS", 50, -1, 3_600_000),
            poison=_integer(env, "CANNSIM_POISON", 0, 0, 255) if poison else None,
            ledger=Path(ledger) if ledger else None,
            rules=tuple(env.get("CANNSIM_RULES", "").split(",")) if env.get("CANNSIM_RULES") else PACKAGES,
            log=env.get("CANNSIM_LOG", "") not in ("", "0"),
        )


def _integer(env: Mapping[str, str], name: str, default: int, low: int, high: int) -> int:
    text = env.get(name, "")
    if not text:
        return default
    try:
        value = int(text, 0)
    except ValueError:
        value = low - 1
    if not low <= value <= high:
        raise SettingError(f"{name}={text}: expected a whole number from {low} to {high}")
    return value


def _bytes(text: str, default: int) -> int:
    if not text:
        return default
    unit = text[-1].upper() if text[-1].isalpha() else ""
    number = text[: len(text) - len(unit)]
    if unit not in _UNITS or not number.isdigit() or not int(number):
        raise SettingError(f"CANNSIM_MEMORY={text}: expected bytes, with K, M or G behind them at most")
    return int(number) * _UNITS[unit]
