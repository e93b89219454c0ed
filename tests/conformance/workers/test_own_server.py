"""A forkserver that a process has for itself, forked from the one that it came from."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from multiprocessing.connection import Connection

import pytest

from polyaccel_conformance.workers.process import ForkServer

HERE = "tests.conformance.workers.test_own_server"
UNUSUAL = "wsgiref.util"


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    with closing(ForkServer()) as found:
        yield found


def tell(connection: Connection) -> None:
    """Who this process is, what it has imported and what its parent had changed."""
    from polyaccel_conformance import words

    said = {"parent": os.getppid(), "imported": UNUSUAL in sys.modules, "dirty": hasattr(words, "dirt")}
    connection.send_bytes(json.dumps(said).encode())
    connection.close()


def stay(connection: Connection) -> None:
    connection.send_bytes(json.dumps({"pid": os.getpid()}).encode())
    time.sleep(60)


def own(connection: Connection, target: str, server: int) -> None:
    """Ask this process's own server for another process, pass on what that one says, and wait to be told to end."""
    from polyaccel_conformance import words

    setattr(words, "dirt", True)  # noqa: B010
    mine = ForkServer(descriptor=server)
    mine.preload([UNUSUAL])
    process, other = mine.start(f"{HERE}:{target}", {})
    said = json.loads(other.recv_bytes()) | {"mine": os.getpid(), "child": process.pid}
    connection.send_bytes(json.dumps(said).encode())
    connection.recv_bytes()


def test_what_it_starts_is_as_clean_as_the_first_server_and_has_what_was_imported_since(server: ForkServer) -> None:
    process, connection = server.start(f"{HERE}:own", {"target": "tell"}, own_server=True)
    said = json.loads(connection.recv_bytes())
    assert said["imported"]
    assert not said["dirty"]
    assert said["parent"] not in (said["mine"], os.getpid())
    connection.close()
    assert process.wait(10.0) == 1  # told nothing, it ended in an error


def test_what_it_has_started_ends_with_its_owner(server: ForkServer) -> None:
    process, connection = server.start(f"{HERE}:own", {"target": "stay"}, own_server=True)
    child = json.loads(connection.recv_bytes())["child"]
    assert _runs(child)
    process.kill()
    assert process.wait(10.0) == -9
    deadline = time.monotonic() + 10
    while _runs(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not _runs(child)


def test_the_end_of_its_owner_is_seen_at_once(server: ForkServer) -> None:
    process, connection = server.start(f"{HERE}:own", {"target": "tell"}, own_server=True)
    connection.recv_bytes()
    process.kill()
    assert connection.poll(10.0)
    with pytest.raises((EOFError, ConnectionResetError)):
        connection.recv_bytes()


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
