"""Running a function in a process of its own, for what must fail: a failed device poisons everything after it."""

from __future__ import annotations

import importlib
import json
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Literal

from polyaccel_conformance.bench import Bench
from polyaccel_conformance.errors import ConformanceError
from polyaccel_conformance.workers.process import ForkServer, Spawn, Starter

Ending = Literal["value", "error", "killed", "timeout"]

PRELOAD = (
    "polyaccel_conformance.harness.faults",
    "polyaccel_conformance.problems.registry",
    "polyaccel_conformance.simulated",
    "torch.distributed.tensor",
    "torch._dynamo",
)
"""The last two are imported by torch itself: when the first tensor of a subclass is indexed, and when the shape of a
result is first worked out without computing it. Every process in which a kernel fails would spend a second on that."""

STARTER = "starter"
"""In a bench's memo."""
_SERVE = "polyaccel_conformance.harness.isolation:serve"
_LEAVE_SECONDS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How it ended.

    Attributes:
        ending: ``value``: it returned ``value``; ``error``: it raised ``error`` (the type's name) with ``message``;
            ``killed`` by ``signal`` (its name), or it left without an answer; ``timeout``: it was ended by force.
    """

    ending: Ending
    value: Any = None
    error: str = ""
    message: str = ""
    signal: str = ""

    def __str__(self) -> str:
        if self.ending == "value":
            return f"returned {self.value!r}"
        if self.ending == "error":
            return f"raised {self.error}: {self.message}"
        return f"was ended by {self.signal}" if self.ending == "killed" else "did not end in time"


def run_isolated(starter: Starter, target: str, *arguments: object, timeout: float = 60.0) -> Outcome:
    """Call ``module:function`` in a new process; arguments and value are what JSON can hold.

    ``starter``: a forkserver, which has imported torch and touched no device, or :class:`Spawn` for what cannot follow
    a fork.

    Raises:
        ConformanceError: no such function.
    """
    resolve(target)
    process, connection = starter.start(_SERVE, {"target": target, "arguments": list(arguments)})
    try:
        if not connection.poll(timeout):
            return Outcome(ending="timeout")
        answer: dict[str, Any] = json.loads(connection.recv_bytes())
    except (EOFError, ConnectionResetError):
        code = process.wait(_LEAVE_SECONDS)
        name = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
        return Outcome(ending="killed", signal=name)
    finally:
        if process.wait(0) is None:
            process.kill()
            process.wait(_LEAVE_SECONDS)
        connection.close()
    return Outcome(**answer)


def starter_of(bench: Bench, preload: Sequence[str] = PRELOAD) -> ForkServer | Spawn:
    """How processes with this bench's backend are started: one forkserver a bench, which ends with this process."""
    found = bench.memo.get(STARTER)
    if not isinstance(found, ForkServer | Spawn):
        found = bench.memo[STARTER] = ForkServer() if bench.backend.fork_safe else Spawn()
    if isinstance(found, ForkServer):
        found.preload(preload)
    return found


def resolve(target: str) -> Callable[..., object]:
    """The function of ``module:function``.

    Raises:
        ConformanceError: no such module or function.
    """
    module, _, name = target.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConformanceError(f"{target!r} names no function: {error}") from error
    if not callable(found):
        raise ConformanceError(f"{target!r} is a {type(found).__name__}, no function")
    function: Callable[..., object] = found
    return function


def serve(connection: Connection, target: str, arguments: list[object]) -> None:
    """In the new process."""
    answer: Mapping[str, object]
    try:
        answer = {"ending": "value", "value": resolve(target)(*arguments)}
    except BaseException as error:
        answer = {"ending": "error", "error": type(error).__name__, "message": str(error)}
    with suppress(BrokenPipeError):
        connection.send_bytes(json.dumps(answer).encode())
    connection.close()
