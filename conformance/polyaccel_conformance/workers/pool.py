"""A pool of workers that persist over cases and are replaced when one dies or hangs."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from polyaccel_conformance.errors import ConformanceError, UsageError
from polyaccel_conformance.subject import Subject
from polyaccel_conformance.workers.process import ForkServer, Process, Spawn, Starter
from polyaccel_conformance.workers.worker import TARGET

OPEN_SECONDS = 120.0
MAX_IN_A_ROW = 25
"""Workers that may end one after the other, without one that survives a case, before the device counts as lost."""
LOG_TAIL = 6
HANG = "hang"
"""The cause of a failure of a case that did not end in time."""


class WorkerLost(ConformanceError):
    """The backend cannot be opened any more, though it could be at first: its device is lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A request to whichever worker is free. ``name``: what the asker knows it by."""

    name: object
    request: Mapping[str, Any]
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A worker's answer, or how it ended instead.

    ``died``: ``crash: signal 11``, ``crash: exit code 3`` or ``hang``; ``log``: its last words.
    """

    job: Job
    reply: Mapping[str, Any]
    died: str = ""
    log: str = ""


@dataclass(slots=True)
class _Worker:
    """``opening``: it has not said yet that its backend is open. ``deadline``: of that, or of its job's answer."""

    process: Process
    connection: Connection
    log: Path
    deadline: float
    opening: bool = True
    job: Job | None = None


class Pool:
    """``count`` workers on one subject.

    The first worker is forked; if its backend is not ``fork_safe``, that one and all others are started afresh. Where a
    device takes seconds to open, it must not take them once a worker: the others open side by side, while those that
    are open answer.

    Args:
        device: index among the backend's devices.
        server: a forkserver to share, closed by its owner; else the pool has one of its own.
    """

    def __init__(self, subject: Subject, *, count: int = 2, device: int = 0, server: ForkServer | None = None) -> None:
        self.facts: Mapping[str, Any] = {}
        self._in_a_row = 0
        self._subject, self._count, self._device = subject, count, device
        self._own = server is None
        self.server = server if server is not None else ForkServer()
        self._starter: Starter = self.server
        self._folder = Path(tempfile.mkdtemp(prefix="polyaccel-conformance-"))
        self._workers: list[_Worker] = []
        self._started = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> Mapping[str, Any]:
        """Open the backend in the first worker; what it says of itself.

        Raises:
            UsageError: the backend or table cannot be opened, with the reason.
        """
        if not self._workers:
            worker = self._begin()
            self.facts = self._opened(worker)
            if not self.facts["fork_safe"] and self._starter is self.server:
                self._remove(worker)
                self._starter = Spawn()
                self.facts = self._opened(self._begin())
        return self.facts

    def run(self, jobs: Iterable[Job]) -> Iterator[Answer]:
        """Answers in order of arrival. Every job is answered once, whatever becomes of its worker.

        Raises:
            WorkerLost: the backend cannot be opened again, or workers die without end.
        """
        self.start()
        waiting = deque[Job]()
        source = iter(jobs)
        exhausted = False
        while True:
            while not exhausted and len(waiting) < self._count:
                job = next(source, None)
                if job is None:
                    exhausted = True
                else:
                    waiting.append(job)
            self._hand_out(waiting)
            self._begin_for(waiting)
            if not waiting and all(worker.job is None for worker in self._workers):
                return
            yield from self._listen()

    def ask(self, job: Job) -> Answer:
        """One job alone."""
        (answer,) = self.run([job])
        return answer

    def close(self) -> None:
        """End all workers. Idempotent."""
        for worker in self._workers:
            if worker.opening:
                # It would not hear before it is open that nobody wants it any more.
                worker.process.kill()
        for worker in self._workers:
            self._end(worker)
        self._workers = []
        if self._own:
            self.server.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    # -- jobs ----------------------------------------------------------------------------------------------------------

    def _hand_out(self, waiting: deque[Job]) -> None:
        for worker in self._workers:
            if not waiting:
                return
            if worker.opening or worker.job is not None:
                continue
            job = waiting.popleft()
            worker.job, worker.deadline = job, time.monotonic() + job.seconds
            with suppress(OSError):
                # A worker that died meanwhile shows when it is listened to.
                worker.connection.send_bytes(json.dumps(job.request).encode())

    def _listen(self) -> Iterator[Answer]:
        """Wait for the next that answers, opens or does neither in time."""
        heard = [worker for worker in self._workers if worker.opening or worker.job is not None]
        patience = max(min(worker.deadline for worker in heard) - time.monotonic(), 0.0)
        ready = wait([worker.connection for worker in heard], patience)
        for worker in heard:
            job = worker.job
            if job is None:
                continue
            if worker.connection in ready:
                try:
                    reply = json.loads(worker.connection.recv_bytes())
                except (EOFError, OSError):
                    code = worker.process.wait(5.0)
                    yield self._lost(worker, job, _ending(code))
                else:
                    worker.job = None
                    if reply.get("retire"):
                        self._remove(worker)
                    else:
                        self._in_a_row = 0
                    yield Answer(job=job, reply=reply)
            elif time.monotonic() >= worker.deadline:
                worker.process.kill()
                yield self._lost(worker, job, HANG)
        # Last, since one that does not open ends the run: no answer that has come is lost with it.
        for worker in heard:
            if worker.opening and (worker.connection in ready or time.monotonic() >= worker.deadline):
                try:
                    self._opened(worker)
                except UsageError as error:
                    raise WorkerLost(str(error)) from error

    def _lost(self, worker: _Worker, job: Job, how: str) -> Answer:
        self._remove(worker)
        return Answer(job=job, reply={}, died=how, log=_tail(worker.log))

    # -- processes -----------------------------------------------------------------------------------------------------

    def _begin_for(self, waiting: deque[Job]) -> None:
        """Begin as many workers as jobs wait for one, up to the count; none is waited for."""
        coming = sum(worker.opening for worker in self._workers)
        for _ in range(min(len(waiting) - coming, self._count - len(self._workers))):
            if self._started > self._count:
                self._in_a_row += 1
            if self._in_a_row > MAX_IN_A_ROW:
                raise WorkerLost(f"{self._in_a_row} workers in a row did not survive a case")
            self._begin()

    def _begin(self) -> _Worker:
        self._started += 1
        log = self._folder / f"worker-{self._started}.log"
        arguments = {"subject": self._subject.to_json(), "device": self._device, "folder": str(self._folder)}
        own = isinstance(self._starter, ForkServer)
        process, connection = self._starter.start(TARGET, arguments, str(log), own_server=own)
        deadline = time.monotonic() + OPEN_SECONDS
        worker = _Worker(process=process, connection=connection, log=log, deadline=deadline)
        self._workers.append(worker)
        return worker

    def _opened(self, worker: _Worker) -> Mapping[str, Any]:
        """What a worker says of its backend once it is open, which is waited for.

        Raises:
            UsageError: it is not, with the reason; the worker is gone.
        """
        try:
            facts = self._facts_of(worker)
        except UsageError:
            self._remove(worker)
            raise
        worker.opening = False
        return facts

    def _facts_of(self, worker: _Worker) -> Mapping[str, Any]:
        label = self._subject.label
        if not worker.connection.poll(max(worker.deadline - time.monotonic(), 0.0)):
            worker.process.kill()
            raise UsageError(f"{label} did not open within {OPEN_SECONDS:g} s")
        try:
            answer: Mapping[str, Any] = json.loads(worker.connection.recv_bytes())
        except (EOFError, OSError):
            code = worker.process.wait(5.0)
            raise UsageError(f"{label} ended its process: {_ending(code)}; {_tail(worker.log)}") from None
        if "error" in answer:
            error = answer["error"]
            raise UsageError(f"{label} cannot be opened: {error['type']}: {error['message']}")
        facts: Mapping[str, Any] = answer["facts"]
        return facts

    def _remove(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        self._end(worker)

    def _end(self, worker: _Worker) -> None:
        worker.connection.close()
        if worker.process.wait(1.0 if worker.job is None else 0.2) is None:
            worker.process.kill()
            worker.process.wait(5.0)
        worker.job = None


def _ending(code: int | None) -> str:
    if code is None:
        return "crash: it closed its connection"
    return f"crash: signal {-code}" if code < 0 else f"crash: exit code {code}"


def _tail(log: Path) -> str:
    """The last lines of what a process wrote."""
    try:
        lines = log.read_text(errors="replace").strip().splitlines()
    except OSError:
        return ""
    frames = [line.strip() for line in lines if line.lstrip().startswith("File ")]
    return "; ".join(frames[:LOG_TAIL] if frames else [line.strip() for line in lines[-LOG_TAIL:]])
