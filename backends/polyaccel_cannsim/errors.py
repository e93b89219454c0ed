"""What the simulator raises, and how CANN words an operator's refusal."""

from __future__ import annotations

import enum
import os
import time


class CannsimError(Exception):
    """Base of every error of the simulator itself."""


class CompilerMissing(CannsimError, FileNotFoundError):
    """No C compiler was found, and the libraries are not in the cache yet."""


class BuildFailed(CannsimError, RuntimeError):
    """The compiler refused the sources; the message holds its command and its words."""


class NotInstalled(CannsimError, RuntimeError):
    """The simulated libraries are not loaded in this process, or cannot be any more."""


class SettingError(CannsimError, ValueError):
    """A setting has a value that cannot work; the message names variable, value and what is accepted."""


class RuleError(CannsimError, TypeError):
    """An operator's rule contradicts itself: a signature that does not parse, a name given twice."""


class Status(enum.IntEnum):
    """Return codes of aclnn functions (CANN documentation, "aclnn return codes") and of the runtime (acl_rt.h)."""

    NULL_POINTER = 161001
    BAD_PARAMETER = 161002
    RUNTIME = 361001
    INNER = 561000
    NOT_SIMULATED = 561103
    DEVICE_FAULT = 507015


class ErrorText(enum.Enum):
    """How CANN lays out what ``aclGetRecentErrMsg`` returns."""

    CLASSIC = "classic"
    """Up to 8.1: ``EZ9999: Inner Error!`` and a line with the process and the time."""
    STAMPED = "stamped"
    """From 8.2: ``[PID: 1] 2025-08-01-12:00:00.000.000 (EZ9999): Inner Error!``."""


class Refused(Exception):
    """CANN would refuse this call.

    Raised in phase 1 or in a ``Launch.check`` it becomes that call's return code; raised while the operator computes it
    becomes a failure of the device, which the next synchronisation of the stream reports.

    Args:
        code: a ``Status`` or any other number that the function returns.
        text: the reason in CANN's words, with the values seen.
        prefix: CANN's error class: ``EZ9999`` inner error, ``EZ1001`` invalid argument, ``EI0003`` for a
            collective.
    """

    def __init__(self, code: int, text: str, prefix: str = "EZ9999") -> None:
        super().__init__(code, text, prefix)
        self.code = int(code)
        self.text = text
        self.prefix = prefix

    def __str__(self) -> str:
        return f"{self.prefix}: {self.text} (code {self.code})"

    def report(self, operator: str, style: ErrorText) -> str:
        """What ``aclGetRecentErrMsg`` then returns."""
        return cann_text(operator, self, style)


def cann_text(operator: str, refusal: Refused, style: ErrorText) -> str:
    """The text of a refusal as CANN would hand it to torch_npu."""
    moment = time.time()
    stamp = time.strftime("%Y-%m-%d-%H:%M:%S", time.localtime(moment)) + f".{int(moment * 1e6) % 1_000_000:06d}"
    stamp = f"{stamp[:-3]}.{stamp[-3:]}"
    title = "Inner Error!" if refusal.prefix.endswith("9999") else f"Check {operator} failed."
    if style is ErrorText.CLASSIC:
        head = f"{refusal.prefix}: {title}\n{refusal.prefix}: [PID: {os.getpid()}] {stamp} "
    else:
        head = f"[PID: {os.getpid()}] {stamp} ({refusal.prefix}):  {title}\n        "
    trace = f"TraceBack (most recent call last):\n        {operator} launch failed, errno[{refusal.code}]."
    return f"{head}{operator}: {refusal.text}\n        {trace}\n"


def op_plugin_6_text(function: str, detail: str, *, device: int, rank: int) -> str:
    """How torch_npu of the op-plugin 6.0 and 7.0 era worded a failed aclnn call (torch 2.1 to 2.6).

    The wheel that runs on the simulator words it the later way; this text serves tests of what reads both.
    """
    stamp = time.strftime("%Y-%m-%d-%H:%M:%S", time.localtime())
    return (
        f"call {function} failed, detail:{detail}\n"
        f"[ERROR] {stamp} (PID:{os.getpid()}, Device:{device}, RankID:{rank}) ERR01005 OPS internal error"
    )
