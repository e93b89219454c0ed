"""What a worker process does: apply the engine's commands to its runner, in order, and answer.

Answers are tuples: ``("progress", done, total)``, ``("result", result or None, state hash)``,
``("reply", token, succeeded, value)`` and, once and last, ``("died", summary, traceback, error)``.

Of several ranks, one that finds no room for a step says ``("no_room", why)`` and gives up the group; the others' steps
then fail in a collective, they say ``("broken", summary, traceback, error)`` and give it up as well. ``part`` reaches
those that had nothing to wait for. All skip steps until they are told to ``meet``. The engine ends those that were left
alone by a rank that died.
"""

from __future__ import annotations

import os
import threading
import traceback
from collections import deque
from multiprocessing.connection import Connection

from polyaccel.backend.adapter_store import SlotRange
from polyaccel.backend.backend import RankAddress
from polyaccel.backend.errors import CommunicationError
from polyaccel.engine.config import EngineConfig
from polyaccel.engine.messages import StepMessage
from polyaccel.engine.runner import PendingStep, PreparedAdapter, Runner


def serve(connection: Connection, config: EngineConfig, address: RankAddress, threads: int | None) -> None:
    """Load the model, then serve until told to close."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    loop = _Loop(connection, address)
    try:
        loop.start(config, address)
        loop.run()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except BaseException as error:
        loop.send(("died", *_told(error)))


class _Loop:
    def __init__(self, connection: Connection, address: RankAddress) -> None:
        self._connection = connection
        self._rank = address.rank
        self._several = address.world_size > 1
        self._lock = threading.Lock()
        self._pending: deque[PendingStep] = deque()
        self._prepared: dict[int, PreparedAdapter] = {}

    def send(self, message: tuple[object, ...]) -> None:
        with self._lock:
            self._connection.send(message)

    def start(self, config: EngineConfig, address: RankAddress) -> None:
        self._runner = Runner(config, address)
        last = -1.0

        def progress(done: int, total: int) -> None:
            nonlocal last
            share = done / max(total, 1)
            if share - last >= 0.01 or done == total:
                last = share
                self.send(("progress", done, total))

        capacity = self._runner.load(progress)
        self.send(("ready", os.getpid(), capacity))

    def run(self) -> None:
        while True:
            # With nothing new to queue, the oldest step's result is waited for and sent.
            if self._pending and not self._connection.poll(0):
                self._answer_step()
                continue
            command = self._connection.recv()
            if command[0] == "step":
                self._step(command[1])
            elif command[0] == "part":
                if not self._runner.apart:
                    self._runner.part(command[1])
            elif command[0] == "meet":
                try:
                    self._runner.meet(command[1])
                except CommunicationError as error:
                    # A rank that came may have parted again before this one had seen it.
                    self._broken(error)
            elif command[0] == "close":
                self._runner.close()
                return
            else:
                self._control(command)

    def _step(self, message: StepMessage) -> None:
        try:
            step = self._runner.execute(message)
        except CommunicationError as error:
            self._broken(error)
            step = self._unserved(message.step_id)
        if step.no_room and self._several and not self._runner.apart:
            self.send(("no_room", step.no_room))
            # The steps before it had their room on every rank.
            while self._pending:
                self._answer_step()
            if not self._runner.apart:
                self._runner.part(step.no_room)
        self._pending.append(step)
        # A device that computes before it returns: the engine need not wait for the step that it has queued meanwhile.
        while self._pending and self._pending[0].is_ready:
            self._answer_step()

    def _answer_step(self) -> None:
        step = self._pending.popleft()
        if self._runner.apart and not step.no_room:
            step = self._unserved(step.step_id)
        try:
            result = step.wait()
        except CommunicationError as error:
            self._broken(error)
            step = self._unserved(step.step_id)
            result = step.wait()
        state_hash = self._runner.state_hash(step, result)
        self.send(("result", result if self._rank == 0 or result.no_room else None, state_hash))

    def _broken(self, error: CommunicationError) -> None:
        """Say so and let the others go, whose collectives may wait for this rank's."""
        self.send(("broken", *_told(error)))
        self._runner.part(f"rank {self._rank} was left alone in a collective")

    def _unserved(self, step_id: int) -> PendingStep:
        return PendingStep.skipped(step_id, f"rank {self._rank} did not see step {step_id} through")

    def _control(self, command: tuple[object, ...]) -> None:
        kind, token, *arguments = command
        assert isinstance(kind, str)
        assert isinstance(token, int)
        if kind == "prepare":
            thread = threading.Thread(target=self._reply, args=(token, self._prepare, (token, *arguments)), daemon=True)
            thread.start()
            return
        while self._pending:
            self._answer_step()
        handlers = {
            "commit": self._commit,
            "discard": lambda prepared: self._prepared.pop(prepared, None) and None,
            "clear": self._runner.clear_adapter,
            "merge": self._runner.merge_adapter,
            "unmerge": self._runner.unmerge_adapters,
            "explain": self._runner.explain,
            "collectives": self._runner.collectives,
        }
        self._reply(token, handlers[kind], tuple(arguments))

    def _prepare(self, token: int, path: str, allow_unmatched: bool, allow_no_effect: bool) -> int:
        prepared = self._runner.prepare_adapter(path, allow_unmatched=allow_unmatched, allow_no_effect=allow_no_effect)
        self._prepared[token] = prepared
        return prepared.matched.max_rank

    def _commit(self, prepared: int, name: str, where: SlotRange, generation: int) -> object:
        receipt = self._runner.commit_adapter(self._prepared.pop(prepared), name, where, generation)
        return (receipt if self._rank == 0 else None), self._runner.plan_digest()

    def _reply(self, token: int, handler: object, arguments: tuple[object, ...]) -> None:
        assert callable(handler)
        try:
            value: object = handler(*arguments)
        except Exception as error:
            self.send(("reply", token, False, _portable(error), traceback.format_exc()))
            return
        self.send(("reply", token, True, value, ""))


def _told(error: BaseException) -> tuple[str, str, BaseException | None]:
    """Of an error that is being handled: summary, traceback and, where it can be sent, the error itself."""
    return f"{type(error).__name__}: {error}", traceback.format_exc(), _portable(error)


def _portable(error: BaseException) -> BaseException | None:
    """The error itself if it survives pickling, so that the caller sees its type; else None."""
    import pickle

    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:
        return None
    return copy if type(copy) is type(error) else None
