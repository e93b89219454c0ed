"""Starting and stopping one worker process, and the connection to it."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Mapping
from multiprocessing.connection import Connection


class WorkerProcess:
    """A child running :mod:`polyaccel.parallel.worker`, told to call ``module.function(connection, *arguments)``.

    ``connection`` is the parent's end. The child ends when the parent does.

    Args:
        environment: variables set for the child on top of this process's.
        send_timeout: seconds after which sending to a child that reads nothing fails with an OSError; None waits for
            ever.

    Raises:
        OSError: the child could not be started.
    """

    def __init__(
        self,
        module: str,
        function: str,
        arguments: tuple[object, ...],
        *,
        environment: Mapping[str, str] | None = None,
        send_timeout: float | None = None,
    ) -> None:
        ours, theirs = socket.socketpair()
        lifeline_read, self._lifeline = os.pipe()
        try:
            # -P: the working directory is searched only where the parent searches it.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "polyaccel.parallel.worker", str(theirs.fileno()), str(lifeline_read)],
                pass_fds=(theirs.fileno(), lifeline_read),
                stdin=subprocess.DEVNULL,
                env={**os.environ, **_import_path(), **(environment or {})},
            )
        except BaseException:
            ours.close()
            os.close(self._lifeline)
            raise
        finally:
            theirs.close()
            os.close(lifeline_read)
        self.connection = Connection(ours.detach())
        if send_timeout is not None:
            limit_sending(self.connection, send_timeout)
        try:
            self.connection.send((module, function, arguments))
        except BaseException:
            self.stop(0.0)
            self.close()
            raise

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
            return f"was killed by {_signal_name(-code)}"
        return f"exited with code {code}"

    def kill(self) -> None:
        """End the process at once. Does not wait; idempotent."""
        self._process.kill()

    def stop(self, timeout: float) -> None:
        """Wait ``timeout`` seconds for the process to end by itself, then kill it. Idempotent."""
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def close(self) -> None:
        """Close the parent's ends, once no thread reads from ``connection`` any more. Idempotent."""
        self.connection.close()
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1


def limit_sending(connection: Connection, seconds: float) -> None:
    """Let sending over a socket to an end that reads nothing fail with an OSError after ``seconds``."""
    whole, fraction = divmod(seconds, 1.0)
    patience = struct.pack("ll", int(whole), int(fraction * 1_000_000))
    with socket.socket(fileno=os.dup(connection.fileno())) as same:
        same.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, patience)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _import_path() -> dict[str, str]:
    # The parent may have found the package through sys.path (a checkout, a notebook's folder), not by installation.
    return {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
