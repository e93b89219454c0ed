"""Running a function in a process of its own, for what must fail: a failed device poisons everything after it."""

from __future__ import annotations

import importlib
import multiprocessing
import signal
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Literal

from polyaccel_conformance.errors import ConformanceError

Ending = Literal["value", "error", "killed", "timeout"]
Method = Literal["forkserver", "spawn"]

PRELOADED = ("torch", "numpy", "polyaccel_conformance.harness.isolation")


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


def run_isolated(
    target: str, *arguments: object, timeout: float = 60.0, method: Method = "forkserver"
) -> Outcome:
    """Call ``module:function`` with picklable arguments in a new process.

    ``method``: a forkserver has imported torch already (and has touched no device); ``spawn`` is for what cannot
    follow a fork.

    Raises:
        ConformanceError: no such function.
    """
    resolve(target)
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(list(PRELOADED))
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(sender, target, arguments), daemon=True)  # type: ignore[attr-defined]
    process.start()
    sender.close()
    try:
        if not receiver.poll(timeout):
            return Outcome(ending="timeout")
        ending, *parts = receiver.recv()
    except EOFError:
        process.join()
        code = process.exitcode
        name = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
        return Outcome(ending="killed", signal=name)
    finally:
        if process.is_alive():
            process.join(1.0)
        if process.is_alive():
            process.kill()
        process.join()
        receiver.close()
    if ending == "value":
        return Outcome(ending="value", value=parts[0])
    return Outcome(ending="error", error=parts[0], message=parts[1])


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


def _serve(sender: Connection, target: str, arguments: tuple[object, ...]) -> None:
    try:
        value = resolve(target)(*arguments)
    except BaseException as error:
        sender.send(("error", type(error).__name__, str(error)))
    else:
        sender.send(("value", value))
    sender.close()
