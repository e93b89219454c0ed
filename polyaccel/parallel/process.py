"""Starting and stopping one worker process, and the connection to it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from multiprocessing.connection import Connection


class WorkerProcess:
    """A child running :mod:`polyaccel.parallel.worker`, told to call ``module.function(connection, *arguments)``.

    ``connection`` is the parent's end. The child ends when the parent does.
    """

    def __init__(
        self, module: str, function: str, arguments: tuple[object, ...], *, environment: Mapping[str, str] | None = None
    ) -> None:
        ours, theirs = socket.socketpair()
        lifeline_read, self._lifeline = os.pipe()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "polyaccel.parallel.worker", str(theirs.fileno()), str(lifeline_read)],
                pass_fds=(theirs.fileno(), lifeline_read),
                stdin=subprocess.DEVNULL,
                env={**os.environ, **_import_path(), **(environment or {})},
            )
        finally:
            theirs.close()
            os.close(lifeline_read)
        self.connection = Connection(ours.detach())
        self.connection.send((module, function, arguments))

    @property
    def pid(self) -> int:
        return self._process.pid

    def alive(self) -> bool:
        return self._process.poll() is None

    def exit_text(self, timeout: float = 2.0) -> str:
        """How the process ended, for an error message."""
        try:
            code = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return "stopped answering"
        if code < 0:
            return f"was killed by {signal.Signals(-code).name}"
        return f"exited with code {code}"

    def stop(self, timeout: float) -> None:
        """Wait for the process to end by itself, then kill it. Idempotent."""
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self.connection.close()
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1


def _import_path() -> dict[str, str]:
    # The parent may have found the package through sys.path (a checkout, a notebook's folder) rather than by
    # installation.
    return {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
