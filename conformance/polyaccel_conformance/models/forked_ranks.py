"""The engine's rank processes, forked from a server that has imported the engine, rather than started afresh.

A new interpreter needs seconds for its imports, and a question on four ranks needs four. The engine's own start of
processes is what its users have and is tested there.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from unittest import mock

from polyaccel.backend import RankAddress
from polyaccel.engine import process_executor
from polyaccel.parallel.process import limit_sending
from polyaccel_conformance.workers.process import ForkServer

ENGINE = ("polyaccel.engine.worker_loop", "polyaccel.models.llama", "polyaccel.models.mixtral")
"""What every rank imports and no device is touched by."""
TARGET = "polyaccel_conformance.models.forked_ranks:serve"


class ForkedRank:
    """What :class:`polyaccel.parallel.process.WorkerProcess` is to the engine. The server ends it when the engine's
    process is gone.

    Args:
        environment: is the server's; every library has one thread there.
    """

    def __init__(
        self,
        server: ForkServer,
        module: str,
        function: str,
        arguments: tuple[object, ...],
        *,
        environment: Mapping[str, str] | None = None,
        send_timeout: float | None = None,
    ) -> None:
        self._process, self.connection = server.start(TARGET, {})
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
        return self._process.wait(0.0) is None

    def exit_text(self, timeout: float = 2.0) -> str:
        """How the process ended, for an error message."""
        code = self._process.wait(timeout)
        if code is None:
            return "stopped answering"
        return f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"

    def kill(self) -> None:
        """End the process at once. Does not wait; idempotent."""
        self._process.kill()

    def stop(self, timeout: float) -> None:
        """Wait ``timeout`` seconds for the process to end by itself, then kill it. Idempotent."""
        if self._process.wait(timeout) is None:
            self._process.kill()
            self._process.wait(5.0)

    def close(self) -> None:
        """Close the parent's end. Idempotent."""
        self.connection.close()


@contextmanager
def forked_ranks(server: ForkServer) -> Iterator[None]:
    """Engines of several ranks that are opened inside fork them from ``server``."""
    server.preload(ENGINE)

    def start(module: str, function: str, arguments: tuple[object, ...], **options: object) -> ForkedRank:
        return ForkedRank(server, module, function, arguments, **options)  # type: ignore[arg-type]

    with mock.patch.object(process_executor, "WorkerProcess", start):
        yield


def serve(connection: Connection) -> None:
    """In the new process: what :mod:`polyaccel.parallel.worker` does."""
    module, function, arguments = connection.recv()
    for address in arguments:
        if isinstance(address, RankAddress):
            _share_cores(address)
    getattr(importlib.import_module(module), function)(connection, *arguments)


def _share_cores(address: RankAddress) -> None:
    """Keep to one core where cores are few: a rank has a thread that waits for messages by asking again and again, and
    moved about these hinder all ranks (four on two cores take 2.5 times as long)."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2 * address.world_size:
        os.sched_setaffinity(0, {cores[address.rank % len(cores)]})
