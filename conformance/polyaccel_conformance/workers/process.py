"""Starting processes: through the forkserver, or afresh."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Protocol

from polyaccel_conformance.errors import ConformanceError

START_SECONDS = 120.0


class Process(Protocol):
    """A started process."""

    @property
    def pid(self) -> int: ...

    def kill(self) -> None: ...

    def wait(self, seconds: float) -> int | None:
        """Its exit code, negative for a signal; None if it still runs after ``seconds``."""


class Starter(Protocol):
    """How processes come into being."""

    def start(
        self, target: str, arguments: Mapping[str, object], log: str = "", *, own_server: bool = False
    ) -> tuple[Process, Connection]:
        """``target`` is ``module:function``, called there with the other end of the connection and ``arguments``."""

    def close(self) -> None: ...


class ForkServer:
    """One server process for all workers and ranks of a run. Starts with the first process. Any thread may ask it.

    Args:
        preload: modules that the server imports beside those that every worker needs.
        descriptor: the socket of a server that runs already and belongs to this process.

    Raises:
        ConformanceError: the server cannot be started; says why.
    """

    def __init__(self, preload: Sequence[str] = (), descriptor: int | None = None) -> None:
        self._preload = tuple(preload)
        self._server: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._asking = threading.Lock()
        if descriptor is not None:
            self._control = socket.socket(fileno=descriptor)
            self._control.settimeout(START_SECONDS)

    def start(
        self, target: str, arguments: Mapping[str, object], log: str = "", *, own_server: bool = False
    ) -> tuple[Process, Connection]:
        """``own_server``: the process gets a forkserver of its own, forked from this one before anything else; the
        argument ``server`` is its descriptor there."""
        ours, theirs = socket.socketpair()
        with theirs:
            request = {"do": "start", "target": target, "arguments": arguments, "log": log, "own_server": own_server}
            answer = self._ask(request, theirs.fileno())
        pid = answer["pid"]
        assert pid is not None
        return ForkedProcess(self, pid), Connection(ours.detach())

    def wait(self, pid: int, seconds: float) -> int | None:
        return self._ask({"do": "wait", "pid": pid, "seconds": seconds})["code"]

    def preload(self, modules: Sequence[str]) -> None:
        """Have the server import these before it forks the next process."""
        new = [name for name in modules if name not in self._preload]
        if new:
            self._ask({"do": "import", "modules": new})
            self._preload += tuple(new)

    def close(self) -> None:
        """End the server and everything that it started."""
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._server is not None:
            self._server.wait()
            self._server = None

    def _ask(self, request: Mapping[str, object], descriptor: int | None = None) -> dict[str, int | None]:
        try:
            with self._asking:
                if self._control is None:
                    self._launch()
                assert self._control is not None
                descriptors = [] if descriptor is None else [descriptor]
                socket.send_fds(self._control, [json.dumps(request).encode()], descriptors)
                data = self._control.recv(1 << 16)
        except OSError as error:
            raise ConformanceError(f"the forkserver does not answer: {error}") from error
        if not data:
            raise ConformanceError("the forkserver has ended; see what it wrote to stderr")
        found: dict[str, int | None] = json.loads(data)
        return found

    def _launch(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._server = subprocess.Popen(
                [sys.executable, "-m", "polyaccel_conformance.workers.server", str(theirs.fileno()), *self._preload],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=environment(),
            )
        ours.settimeout(START_SECONDS)
        self._control = ours


class ForkedProcess:
    """A child of the forkserver."""

    def __init__(self, server: ForkServer, pid: int) -> None:
        self._server = server
        self._pid = pid
        self._code: int | None = None
        self._waiting = threading.Lock()

    @property
    def pid(self) -> int:
        return self._pid

    def kill(self) -> None:
        # Until the server has waited for it, the number cannot belong to another process.
        if self._code is None:
            with suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)

    def wait(self, seconds: float) -> int | None:
        # The server knows a process no more once it has told how it ended.
        with self._waiting:
            if self._code is None:
                self._code = self._server.wait(self._pid, seconds)
            return self._code


class Spawn:
    """A new interpreter for every process."""

    def start(
        self, target: str, arguments: Mapping[str, object], log: str = "", *, own_server: bool = False
    ) -> tuple[Process, Connection]:
        """``own_server`` is not for what cannot follow a fork."""
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "polyaccel_conformance.workers.spawned", str(theirs.fileno())),
                    *(target, json.dumps(arguments), log),
                ],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=environment(),
            )
        return SpawnedProcess(process), Connection(ours.detach())

    def close(self) -> None:
        return None


class SpawnedProcess:
    """A child of this process."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        self._process.kill()

    def wait(self, seconds: float) -> int | None:
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None


def environment() -> dict[str, str]:
    """One thread in every library, and the import path of this process."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return {**os.environ, **threads, "PYTHONPATH": path}
