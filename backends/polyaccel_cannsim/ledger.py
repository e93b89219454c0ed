"""Every call that reached the simulated CANN, with the descriptors it came with."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .descriptor import AclScalar, AclTensor


@dataclass(slots=True)
class Call:
    """One call.

    Attributes:
        name: ``aclnnRmsNorm``, ``aten::mul.Tensor``, ``HcclAllReduce``.
        arguments: as decoded; tensors are ``AclTensor`` (``torch.Tensor`` never: nothing is kept alive).
        device: number of the card; -1 unknown.
        stream: the runtime's number of the stream; -1 where the call takes none.
        captured: recorded into a graph, not run.
        replayed: run as part of a graph.
        refused: the code it was refused with, or 0.
    """

    name: str
    arguments: tuple[Any, ...]
    device: int = -1
    stream: int = -1
    captured: bool = False
    replayed: bool = False
    refused: int = 0

    @property
    def tensors(self) -> list[AclTensor]:
        """The tensors among the arguments, those in lists included, in order."""
        out: list[AclTensor] = []
        for one in self.arguments:
            # Every launch asks this of up to fifty arguments: exact types are half as dear as isinstance.
            kind = type(one)
            if kind is AclTensor:
                out.append(one)
            elif (kind is tuple or kind is list) and one and type(one[0]) is not int:
                out += [member for member in one if type(member) is AclTensor]
        return out

    def line(self) -> str:
        """For golden files: the name and each argument, without addresses."""
        state = " captured" if self.captured else " replayed" if self.replayed else ""
        refused = f" refused {self.refused}" if self.refused else ""
        return f"{self.name}({', '.join(_plain(one) for one in self.arguments)}) npu:{self.device}{state}{refused}"


def _plain(value: Any) -> str:
    if isinstance(value, AclTensor):
        return repr(value)
    if isinstance(value, AclScalar):
        return repr(value.value)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_plain(one) for one in value) + "]"
    return repr(value)


class Ledger:
    """Calls in the order in which they were launched. Safe to use from several threads."""

    def __init__(self) -> None:
        self._calls: list[Call] = []
        self._lock = threading.Lock()

    def add(self, call: Call) -> None:
        with self._lock:
            self._calls.append(call)

    def reset(self) -> None:
        """Forgets everything so far."""
        with self._lock:
            self._calls = []

    def __len__(self) -> int:
        return len(self._calls)

    def __iter__(self) -> Iterator[Call]:
        with self._lock:
            calls = list(self._calls)
        return iter(calls)

    def names(self) -> list[str]:
        return [call.name for call in self]

    def counts(self) -> Counter[str]:
        """How often each name was called and ran: captures and refused calls are not counted, replays are."""
        return Counter(call.name for call in self if not call.captured and not call.refused)

    def lines(self) -> list[str]:
        return [call.line() for call in self]

    def write(self, path: Path) -> None:
        """JSON lines: name, device, stream, flags and the printed arguments."""
        with path.open("w", encoding="utf-8") as file:
            for call in self:
                entry = {
                    "name": call.name,
                    "device": call.device,
                    "stream": call.stream,
                    "captured": call.captured,
                    "replayed": call.replayed,
                    "refused": call.refused,
                    "arguments": [_plain(one) for one in call.arguments],
                }
                file.write(json.dumps(entry) + "\n")
