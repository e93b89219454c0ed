"""The forkserver: a process that has imported torch, numpy and the oracle, touches no device, and forks on request.

Run as ``python -m polyaccel_conformance.workers.server FD [MODULE ...]``, with modules to import beside those that
every worker needs: FD is a socket on which each message is one JSON line.
``{"do": "start", "target": "module:function", "arguments": {...}, "log": PATH}`` comes with a second descriptor, the
new process's own connection; the answer is ``{"pid": N}``. With ``"own_server": true`` the process has a server of its
own, forked from this one. ``{"do": "import", "modules": [...]}`` answers ``{}``.
``{"do": "wait", "pid": N, "seconds": S}`` answers ``{"code": C}``: its exit code, negative for a signal, None while it
runs.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

PRELOAD = (
    "polyaccel_conformance.workers.worker",
    "polyaccel_conformance.problems.registry",
    "polyaccel_conformance.checks.registry",
    "polyaccel_conformance.multi.worker",
    "polyaccel.backend.composite.communicator",
)
LONGEST = 1 << 20


def serve(control: socket.socket) -> None:
    """Answer until the other end is closed; then end what still runs."""
    running: set[int] = set()
    while True:
        data, descriptors, _, _ = socket.recv_fds(control, LONGEST, 1)
        if not data:
            break
        request: dict[str, Any] = json.loads(data)
        if request["do"] == "start":
            pid = _fork(control, descriptors[0], request)
            os.close(descriptors[0])
            running.add(pid)
            answer: Mapping[str, object] = {"pid": pid}
        elif request["do"] == "import":
            for name in request["modules"]:
                importlib.import_module(name)
            answer = {}
        else:
            code = _wait(request["pid"], request["seconds"])
            if code is not None:
                running.discard(request["pid"])
            answer = {"code": code}
        control.sendall(json.dumps(answer).encode())
    for pid in running:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _fork(control: socket.socket, descriptor: int, request: Mapping[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        control.close()
        redirect(request["log"])
        arguments = request["arguments"]
        if request["own_server"]:
            arguments = {**arguments, "server": _fork_server(descriptor)}
        run_target(request["target"], Connection(descriptor), arguments)
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        # No interpreter shutdown: what the server registered for its own exit is not the child's.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _fork_server(connection: int) -> int:
    """A server that this process owns, as clean as the one that it was forked from; the descriptor for asking it."""
    ours, theirs = socket.socketpair()
    if os.fork():
        theirs.close()
        return ours.detach()
    try:
        ours.close()
        # While it is open here, nobody sees that its owner is gone.
        os.close(connection)
        serve(theirs)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(0)


def run_target(target: str, connection: Connection, arguments: Mapping[str, Any]) -> None:
    """Call ``module:function`` with the connection and the arguments."""
    module, _, name = target.partition(":")
    getattr(importlib.import_module(module), name)(connection, **arguments)


def redirect(log: str) -> None:
    """What is printed goes to a file: the terminal belongs to the parent."""
    if log:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.close(file)


def _wait(pid: int, seconds: float) -> int | None:
    end = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= end:
            return None
        time.sleep(0.002)


def main() -> None:
    """Import what every worker needs, then serve."""
    # An interrupt goes to the whole foreground group; the parent decides what happens then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    control = socket.socket(fileno=int(sys.argv[1]))
    os.set_inheritable(control.fileno(), False)
    import torch

    torch.set_num_threads(1)
    for name in (*PRELOAD, *sys.argv[2:]):
        importlib.import_module(name)
    # What has been imported lives as long as any child: no collection of theirs has to look at it.
    gc.collect()
    gc.freeze()
    # A case makes thousands of objects and no cycles worth looking for so often.
    gc.set_threshold(10_000, 20, 20)
    serve(control)


if __name__ == "__main__":
    main()
