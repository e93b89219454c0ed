"""Functions that worker processes of the tests run."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
from multiprocessing.connection import Connection


def echo(connection: Connection, *arguments: object) -> None:
    """Send the arguments, then every message back until the parent hangs up."""
    connection.send(arguments)
    while True:
        connection.send(connection.recv())


def send_pid(connection: Connection) -> None:
    connection.send(os.getpid())


def send_environment(connection: Connection, name: str) -> None:
    connection.send(os.environ.get(name))


def send_import_path(connection: Connection) -> None:
    connection.send(list(sys.path))


def send_attribute(connection: Connection, module: str, name: str) -> None:
    connection.send(getattr(importlib.import_module(module), name))


def raise_error(connection: Connection) -> None:
    raise ValueError("a worker's own error")


def leave(connection: Connection, code: int) -> None:
    sys.exit(code)


def die(connection: Connection, number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(60)


def stuck(connection: Connection) -> None:
    """Ready, then deaf: reads nothing, and ignores what asks politely."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    connection.send("stuck")
    while True:
        time.sleep(60)
