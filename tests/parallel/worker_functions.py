"""What the worker processes of tests/parallel run."""

from __future__ import annotations

import os
import signal
import sys
import time
from multiprocessing.connection import Connection


def echo(connection: Connection, *arguments: object) -> None:
    """Send the arguments back, then every message, until the connection ends."""
    connection.send(arguments)
    while True:
        connection.send(connection.recv())


def report(connection: Connection, name: str) -> None:
    """Send what the process was started with."""
    connection.send((os.environ.get(name), sys.path, os.getpid(), signal.getsignal(signal.SIGINT) == signal.SIG_IGN))


def leave(connection: Connection, code: int) -> None:
    os._exit(code)


def fail(connection: Connection) -> None:
    raise ValueError("this function fails")


def ignore(connection: Connection) -> None:
    """Say hello, then read nothing for ever."""
    connection.send("here")
    while True:
        time.sleep(1)
