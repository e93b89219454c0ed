"""One worker process a rank, so that a device fault does not take the user's program with it."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from multiprocessing.connection import Connection, wait

import numpy as np

from polyaccel.backend.adapter_store import SlotRange
from polyaccel.backend.backend import RankAddress
from polyaccel.backend.errors import CommunicationError, EngineDead, OutOfMemory, WorkerError
from polyaccel.engine.config import EngineConfig
from polyaccel.engine.executor import Executor, PreparedHandle
from polyaccel.engine.messages import Capacity, StepMessage, StepResult
from polyaccel.lora.receipt import AdapterReceipt
from polyaccel.parallel.process import WorkerProcess

CLOSE_SECONDS = 5.0
# Importing torch and reading metadata report nothing, however small the engine's own timeout is.
START_SECONDS = 120.0
# What a rank that found no room leaves waiting is let go at once, unless its transport knows no way.
PART_SECONDS = 30.0
# A dead rank breaks the others' collectives, and their reports may arrive before the news of its death.
BLAME_SECONDS = 1.0


class ProcessExecutor(Executor):
    """Starts the workers, sends every step to all of them and compares what they report.

    A thread receives all answers, so that a worker's death is noticed at once, whoever is waiting. The first death ends
    the group: the other workers are killed, as they may hang in a collective. A rank that found no room for a step is
    no death: no rank has run that step then, as far as the caller is concerned, nor those after it, and the ranks meet
    anew before the step that resumes.

    Args:
        config: ``backend`` is already chosen; workers never choose.
        progress: called with bytes done and in total, of the slowest rank.

    Raises:
        OutOfMemory: a worker found no room; what it says is the cause.
        EngineDead: a worker failed otherwise while starting; its error is the cause.
    """

    def __init__(self, config: EngineConfig, progress: Callable[[int, int], None] | None = None) -> None:
        self._config = config
        self._world = config.tensor_parallel_size
        self._folder = tempfile.mkdtemp(prefix="polyaccel-ranks-")
        self._condition = threading.Condition()
        self._sending = threading.Lock()
        self._results: list[deque[tuple[StepResult | None, int]]] = [deque() for _ in range(self._world)]
        self._replies: dict[tuple[int, int], Future[object]] = {}
        self._next_token = 0
        self._dead: EngineDead | None = None
        self._closing = False
        self._reported: dict[int, None] = {}
        self._no_room = ""
        self._apart = False
        self._parted_by = math.inf
        self._meetings = 0
        self._suspect: tuple[WorkerError, float] | None = None
        self._heard = time.monotonic()
        self._receiver: threading.Thread | None = None
        self._progress_callback = progress
        self._progress: list[tuple[int, int]] = [(0, 0)] * self._world
        self._capacities: list[Capacity | None] = [None] * self._world
        threads = config.threads or max(1, (os.cpu_count() or 1) // self._world)
        init_method = self._meeting_place()
        self._workers: list[WorkerProcess] = []
        try:
            for rank in range(self._world):
                address = RankAddress(
                    rank=rank, world_size=self._world, init_method=init_method, timeout=config.timeout
                )
                arguments = (config, address, threads)
                environment = {"OMP_NUM_THREADS": str(threads)}
                self._workers.append(
                    WorkerProcess(
                        "polyaccel.engine.worker_loop",
                        "serve",
                        arguments,
                        environment=environment,
                        send_timeout=config.timeout,
                    )
                )
            self._receiver = threading.Thread(target=self._receive, name="polyaccel-receiver", daemon=True)
            self._receiver.start()
            self.capacity = self._wait_until_ready()
        except BaseException as error:
            self.close()
            _raise_out_of_memory(error)
            raise

    # -- steps -------------------------------------------------------------------------------------------------------

    def submit(self, message: StepMessage) -> None:
        if message.resumes and self._world > 1:
            self._no_room, self._apart, self._parted_by = "", False, math.inf
            self._send_all(("meet", self._meeting_place()))
        self._send_all(("step", message))

    def collect(self) -> StepResult:
        deadline = time.monotonic() + self._config.timeout
        with self._condition:
            while not all(self._results):
                self._raise_if_dead()
                remaining = min(deadline, self._parted_by) - time.monotonic()
                if remaining <= 0:
                    self._die(self._silence())
                    continue
                self._condition.wait(remaining)
            answers = [results.popleft() for results in self._results]
        skipped = [result for result, _ in answers if result is not None and result.no_room]
        if skipped:
            return self._unserved(skipped[0], deadline)
        hashes = [state_hash for _, state_hash in answers]
        if len(set(hashes)) > 1:
            error = CommunicationError(
                f"ranks disagree after a step: state hashes {hashes}; their results cannot be trusted"
            )
            self._die(error)
            self._raise_if_dead()
        result = answers[0][0]
        assert result is not None
        return result

    def _unserved(self, skipped: StepResult, deadline: float) -> StepResult:
        """A step that not every rank has run, with the reason of the rank that began it; there need not be one."""
        if self._world == 1:
            return skipped
        with self._condition:
            known = self._condition.wait_for(
                lambda: bool(self._no_room) or self._dead is not None or self._closing,
                max(0.0, deadline - time.monotonic()),
            )
        if not known:
            self._die(CommunicationError(f"step {skipped.step_id} was not run: {skipped.no_room}"))
        self._raise_if_dead()
        if not self._apart:
            # Nor may a rank that had nothing more to wait for go on with a group that is given up.
            self._apart = True
            self._send_all(("part", self._no_room))
        return StepResult(step_id=skipped.step_id, ids=np.zeros(0, dtype=np.int64), no_room=self._no_room)

    def _silence(self) -> Exception:
        silent = [rank for rank, results in enumerate(self._results) if not results]
        if self._no_room:
            return OutOfMemory(f"ranks {silent} could not be let go after a step without room ({self._no_room})")
        return CommunicationError(f"ranks {silent} did not finish a step within {self._config.timeout:g} s")

    def _meeting_place(self) -> str:
        """Of ranks that form a new group; none is used twice."""
        self._meetings += 1
        return f"file://{self._folder}/store{self._meetings}"

    # -- control -----------------------------------------------------------------------------------------------------

    def prepare_adapter(
        self, path: str, *, allow_unmatched: bool = False, allow_no_effect: bool = False
    ) -> PreparedHandle:
        token, answers = self._ask("prepare", path, allow_unmatched, allow_no_effect)
        handle = PreparedHandle(token=token, max_rank=0)
        try:
            ranks = self._results_of(answers)
        except BaseException:
            if self._dead is None:
                self.discard_adapter(handle)
            raise
        return PreparedHandle(token=token, max_rank=max(rank for rank in ranks if isinstance(rank, int)))

    def commit_adapter(self, handle: PreparedHandle, name: str, where: SlotRange, generation: int) -> AdapterReceipt:
        try:
            answers = self._results_of(self._ask("commit", handle.token, name, where, generation)[1])
        except BaseException:
            if self._dead is None:
                self.discard_adapter(handle)
                self.clear_adapter(where.slot)
            raise
        receipts, digests = _receipts_and_digests(answers)
        if len(set(digests)) > 1:
            self._die(CommunicationError(f"ranks planned adapter {name!r} differently: {list(digests)}"))
            self._raise_if_dead()
        return receipts[0]

    def discard_adapter(self, handle: PreparedHandle) -> None:
        self._results_of(self._ask("discard", handle.token)[1])

    def clear_adapter(self, slot: int) -> None:
        self._results_of(self._ask("clear", slot)[1])

    def merge_adapter(self, path: str, weight: float) -> None:
        self._results_of(self._ask("merge", path, weight)[1])

    def unmerge_adapters(self) -> None:
        self._results_of(self._ask("unmerge")[1])

    def explain(self) -> list[dict[str, object]]:
        reports = self._results_of(self._ask("explain")[1])
        return [report for report in reports if isinstance(report, dict)]

    def collectives(self) -> list[list[tuple[str, int]]]:
        traces = self._results_of(self._ask("collectives")[1])
        return [trace for trace in traces if isinstance(trace, list)]

    def worker_pids(self) -> list[int]:
        """Process ids in rank order."""
        return [worker.pid for worker in self._workers]

    def close(self) -> None:
        with self._condition:
            if self._closing:
                return
            self._closing = True
            outstanding = list(self._replies.values())
            self._replies.clear()
            ready = self._dead is None and all(self._capacities)
            self._condition.notify_all()
        for future in outstanding:
            future.set_exception(EngineDead("the engine is closed"))
        if ready:
            with self._sending:
                for worker in self._workers:
                    with contextlib.suppress(OSError):
                        worker.connection.send(("close", 0))
        # Workers that load, or whose group is broken, do not listen.
        deadline = time.monotonic() + (CLOSE_SECONDS if ready else 0.0)
        for worker in self._workers:
            worker.stop(max(0.0, deadline - time.monotonic()))
        if self._receiver is not None:
            self._receiver.join()
        for worker in self._workers:
            worker.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    # -- asking ------------------------------------------------------------------------------------------------------

    def _ask(self, kind: str, *arguments: object) -> tuple[int, list[Future[object]]]:
        with self._condition:
            self._raise_if_dead()
            self._next_token += 1
            token = self._next_token
            futures: list[Future[object]] = []
            for rank in range(self._world):
                future: Future[object] = Future()
                self._replies[rank, token] = future
                futures.append(future)
        self._send_all((kind, token, *arguments))
        return token, futures

    def _results_of(self, futures: list[Future[object]]) -> list[object]:
        """Every rank's answer; the first error only after all ranks have answered, so that none is left behind."""
        errors: list[BaseException] = []
        values: list[object] = []
        deadline = time.monotonic() + self._config.timeout
        for rank, future in enumerate(futures):
            try:
                values.append(future.result(max(0.0, deadline - time.monotonic())))
            except TimeoutError:
                self._die(CommunicationError(f"rank {rank} did not answer within {self._config.timeout:g} s"))
                self._raise_if_dead()
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]
        return values

    def _send_all(self, message: tuple[object, ...]) -> None:
        # One sender at a time: large messages are written in several pieces.
        with self._sending:
            self._raise_if_dead()
            for rank, worker in enumerate(self._workers):
                try:
                    worker.connection.send(message)
                except OSError as error:
                    self._raise_once_dead(rank, error)

    def _raise_once_dead(self, rank: int, error: OSError) -> None:
        """Raise what the receiver finds out about a worker that takes no messages: it knows more than a broken pipe."""
        patience = 0.0 if isinstance(error, BlockingIOError) else 2 * BLAME_SECONDS
        with self._condition:
            self._condition.wait_for(lambda: self._dead is not None or self._closing, patience)
        self._die(WorkerError(rank, self._workers[rank].exit_text(0.0), "(it left none)"))
        self._raise_if_dead()

    def _wait_until_ready(self) -> Capacity:
        patience = max(self._config.timeout, START_SECONDS)
        while True:
            with self._condition:
                self._raise_if_dead()
                if not all(self._capacities):
                    self._condition.wait(0.1)
                waiting = [rank for rank, capacity in enumerate(self._capacities) if capacity is None]
                silence = time.monotonic() - self._heard
            self._report_progress()
            capacity = self._capacities[0]
            if not waiting and capacity is not None:
                return capacity
            if silence > patience:
                self._die(CommunicationError(f"ranks {waiting} reported nothing for {patience:g} s while loading"))

    def _report_progress(self) -> None:
        if self._progress_callback is not None and all(total for _, total in self._progress):
            slowest = min(self._progress, key=lambda p: p[0] / p[1])
            self._progress_callback(*slowest)

    # -- receiving ---------------------------------------------------------------------------------------------------

    def _receive(self) -> None:
        connections: dict[Connection, int] = {worker.connection: rank for rank, worker in enumerate(self._workers)}
        while connections and not self._closing:
            for ready in wait(list(connections), timeout=0.2):
                assert isinstance(ready, Connection)
                rank = connections[ready]
                try:
                    message = ready.recv()
                except Exception as error:
                    del connections[ready]
                    self._lost(rank, error)
                    continue
                self._file(rank, message)
            if self._suspect is not None and time.monotonic() > self._suspect[1]:
                self._die(self._suspect[0])
        if self._suspect is not None and not self._closing:
            self._die(self._suspect[0])

    def _lost(self, rank: int, error: Exception) -> None:
        """A worker's connection has ended, or what it sent cannot be read."""
        if self._closing or self._dead is not None or rank in self._reported:
            return
        ended = isinstance(error, (EOFError, OSError))
        summary = self._workers[rank].exit_text() if ended else f"sent what cannot be read: {error!r:.200}"
        self._die(WorkerError(rank, summary, "(it left none)"))

    def _file(self, rank: int, message: tuple[object, ...]) -> None:
        kind = message[0]
        with self._condition:
            self._heard = time.monotonic()
            if kind == "result":
                result, state_hash = message[1], message[2]
                assert result is None or isinstance(result, StepResult)
                assert isinstance(state_hash, int)
                self._results[rank].append((result, state_hash))
            elif kind == "reply":
                self._file_reply(rank, message)
            elif kind == "progress":
                done, total = message[1:]
                assert isinstance(done, int)
                assert isinstance(total, int)
                self._progress[rank] = (done, total)
            elif kind == "ready":
                assert isinstance(message[2], Capacity)
                self._capacities[rank] = message[2]
            elif kind == "no_room":
                # Whoever is left alone in a collective is so for this reason.
                if not self._no_room:
                    self._no_room, self._parted_by = str(message[1]), time.monotonic() + PART_SECONDS
                self._suspect = None
            self._condition.notify_all()
        if kind == "died" or (kind == "broken" and not self._no_room):
            self._failed(rank, message)

    def _failed(self, rank: int, message: tuple[object, ...]) -> None:
        """A worker has died, or was left alone in a collective by one that did."""
        if message[0] == "died":
            self._reported[rank] = None
        cause = WorkerError(rank, str(message[1]), str(message[2]))
        original = message[3]
        if isinstance(original, BaseException):
            cause.__cause__ = original
        if isinstance(original, CommunicationError) and len(self._reported) < self._world:
            if self._suspect is None:
                self._suspect = cause, time.monotonic() + BLAME_SECONDS
            return
        self._die(cause if self._suspect is None or not isinstance(original, CommunicationError) else self._suspect[0])

    def _file_reply(self, rank: int, message: tuple[object, ...]) -> None:
        _, token, succeeded, value, trace = message
        assert isinstance(token, int)
        future = self._replies.pop((rank, token), None)
        if future is None:
            return
        if succeeded:
            future.set_result(value)
        else:
            future.set_exception(value if isinstance(value, BaseException) else WorkerError(rank, "failed", str(trace)))

    def _die(self, cause: Exception) -> None:
        with self._condition:
            first = self._dead is None and not self._closing
            if first:
                self._dead = EngineDead(f"the engine cannot go on: {cause}")
                self._dead.__cause__ = cause
                for future in self._replies.values():
                    future.set_exception(self._dead)
                self._replies.clear()
            self._condition.notify_all()
        if first:
            for worker in self._workers:
                worker.kill()

    def _raise_if_dead(self) -> None:
        if self._dead is not None:
            raise self._dead
        if self._closing:
            raise EngineDead("the engine is closed")


def _raise_out_of_memory(error: BaseException) -> None:
    """As where the engine's own process loads: who lowers an option then need not know of workers."""
    worker = error.__cause__
    if isinstance(worker, WorkerError) and isinstance(worker.__cause__, OutOfMemory):
        raise OutOfMemory(*worker.__cause__.args) from worker


def _receipts_and_digests(answers: list[object]) -> tuple[list[AdapterReceipt], list[str]]:
    """Rank 0's receipt (the other ranks send none) and every rank's plan digest."""
    receipts: list[AdapterReceipt] = []
    digests: list[str] = []
    for answer in answers:
        assert isinstance(answer, tuple)
        if isinstance(answer[0], AdapterReceipt):
            receipts.append(answer[0])
        digests.append(str(answer[1]))
    return receipts, digests
