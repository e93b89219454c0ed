"""What torch_npu says when something fails, read into its parts. Pure Python.

Two generations of text exist. Up to op-plugin 7.0 (torch 2.3.1 and its time) a failed kernel was ``call aclnnX failed,
detail:EZ9999: ...`` with ``ERR01005 OPS internal error``; from 7.1 on (2025-07) it is ``NPU function error: call
aclnnX failed, error code is 161002`` with ``ERR00100 PTA call acl api failed``. The code is ``ERR``, two digits of
module and three of cause (torch_npu's NPUException.h); CANN's own text follows, its first word a letter code such as
EZ9999 (inner error) or EL0003 (invalid argument of the runtime).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

MODULES: Mapping[str, str] = MappingProxyType({"00": "PTA", "01": "OPS", "02": "DIST", "03": "GRAPH", "04": "PROF"})
CAUSES: Mapping[str, str] = MappingProxyType(
    {
        "001": "invalid parameter",
        "002": "invalid type",
        "003": "invalid value",
        "004": "invalid pointer",
        "005": "internal error",
        "006": "memory error",
        "007": "feature not supported",
        "008": "resource not found",
        "009": "resource unavailable",
        "010": "system call failed",
        "011": "timeout",
        "012": "permission denied",
        "100": "call acl api failed",
        "200": "call hccl api failed",
        "300": "call ge api failed",
    }
)
STATUSES: Mapping[int, str] = MappingProxyType(
    {
        107000: "invalid argument of the runtime",
        107001: "invalid device",
        107002: "no context on this thread",
        107003: "stream is not of the current context",
        107030: "the stream is being captured or synchronised",
        161001: "null pointer (first phase)",
        161002: "bad parameter: shape, stride, dtype or value refused (first phase)",
        207000: "feature not supported",
        207001: "out of memory",
        207013: "a task of the stream was aborted",
        361001: "the runtime under aclnn failed",
        500002: "the legacy operator compiler failed",
        507011: "a task of the model failed",
        507014: "AI core timed out",
        507015: "AI core failed: an address outside of memory, or a broken kernel",
        507018: "AI CPU failed",
        507046: "waiting for the stream timed out",
        507048: "AI CPU timed out",
        561000: "inner error",
        561002: "tiling failed",
        561003: "the kernel's binary was not found",
        561103: "a check inside the operator failed",
    }
)
ASYNCHRONOUS = "called asynchronously"
"""What torch_npu adds to a failure of its queue: the Python stack of the exception is not the failing call's."""

_CALL = re.compile(r"call (aclnn\w+|acl\w+|Hccl\w+) failed")
_CURRENT = re.compile(r"current working operator name is (\w+)")
_STATUS = re.compile(r"error code (?:is|:)\s*\[?(\d{5,6})")
_CODE = re.compile(r"\bERR(\d{2})(\d{3})\b")
_RANK = re.compile(r"RankID:\s*(-?\d+)")
_DEVICE = re.compile(r"Device:\s*(-?\d+)")
_CANN = re.compile(r"\b(E[A-Z1-9]\d{4})\)?:\s*(.*?)(?=\n\s*\n|\n\s*TraceBack|\n\[|\Z)", re.S)
_MISSING = re.compile(r"(aclnn\w+)(?: or \w+)? not in libopapi")
_MEMORY = re.compile(r"NPU out of memory|out of memory", re.I)


@dataclass(frozen=True, slots=True, kw_only=True)
class NpuFailure:
    """One failure.

    Attributes:
        operator: the failing function of aclnn, acl or HCCL; empty if the text names none.
        code: ``ERR00100``; empty where TORCH_NPU_COMPACT_ERROR_OUTPUT has removed it.
        module, meaning: the code in words; of the status where there is no code.
        status: CANN's number, or None.
        rank, device: as torch_npu knows them, None for its -1.
        cann: CANN's letter code, such as EZ9999.
        detail: CANN's own sentence.
        asynchronous: it was found after the call; the queue holds nothing that can be trusted.
        generation: 1 for texts up to op-plugin 7.0, 2 from 7.1 on, 0 if it is neither.
    """

    operator: str
    code: str
    module: str
    meaning: str
    status: int | None
    rank: int | None
    device: int | None
    cann: str
    detail: str
    asynchronous: bool
    generation: int

    @property
    def out_of_memory(self) -> bool:
        return self.status == 207001 or bool(_MEMORY.search(self.detail))

    @property
    def communication(self) -> bool:
        """Whether ranks failed each other: HCCL's own codes begin with EI (its documents, fault codes)."""
        return self.cann.startswith("EI") or self.module == "DIST" or self.operator.startswith("Hccl")

    @property
    def is_npu(self) -> bool:
        """Whether the text was torch_npu's at all."""
        return bool(self.operator or self.code or self.cann or self.status)

    def __str__(self) -> str:
        parts = [self.operator or "an unnamed call", "failed"]
        if self.status is not None:
            parts.append(f"with {self.status} ({STATUSES.get(self.status, 'no known status')})")
        if self.code:
            parts.append(f"[{self.code} {self.module}: {self.meaning}]")
        if self.detail:
            parts.append(f"{self.cann + ': ' if self.cann else ''}{self.detail}")
        if self.asynchronous:
            parts.append("(found after the call, by a later one)")
        return " ".join(parts)


def parse(text: str) -> NpuFailure:
    """The parts of an exception's text, or of a log."""
    call, current, missing = _CALL.search(text), _CURRENT.search(text), _MISSING.search(text)
    operator = next((found.group(1) for found in (call, current, missing) if found), "")
    status = _STATUS.search(text)
    number = int(status.group(1)) if status else None
    code = _CODE.search(text)
    cann = _CANN.search(text)
    if code is not None:
        meaning = CAUSES.get(code.group(2), "no known cause")
    else:
        meaning = "" if number is None else STATUSES.get(number, "no known status")
    detail = " ".join(cann.group(2).split()) if cann is not None else ""
    if missing:
        detail = detail or f"{operator} is not in libopapi.so: this CANN is too old for this torch_npu"
    memory = _MEMORY.search(text)
    if memory and not detail:
        detail = text.strip().splitlines()[0]
    generation = 2 if number is not None or (code is not None and code.group(2) == "100") else 0
    if not generation and (call is not None or code is not None):
        generation = 1 if "detail:" in text or (code is not None and code.group(0) == "ERR01005") else 0
    return NpuFailure(
        operator=operator,
        code=code.group(0) if code else "",
        module=MODULES.get(code.group(1), "unknown module") if code else "",
        meaning=meaning,
        status=number,
        rank=_number(_RANK, text),
        device=_number(_DEVICE, text),
        cann=cann.group(1) if cann else "",
        detail=detail,
        asynchronous=ASYNCHRONOUS in text,
        generation=generation,
    )


def _number(pattern: re.Pattern[str], text: str) -> int | None:
    found = pattern.search(text)
    value = int(found.group(1)) if found else -1
    return value if value >= 0 else None
