"""A worker's loop beside a fake runner: the order of its answers, and errors that reach the parent with their type."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import pytest

from polyaccel import AdapterIncompatible, ConfigurationError, OperatorError
from polyaccel.backend.backend import RankAddress
from polyaccel.backend.device import HostCopy, ReadyHostCopy
from polyaccel.engine import worker_loop
from polyaccel.engine.config import EngineConfig
from polyaccel.engine.runner import PendingStep

CONFIG = EngineConfig(model="none", backend="none")
ADDRESS = RankAddress(rank=0, world_size=1, init_method="")


class Late(HostCopy):
    """A copy that notes when it is waited for."""

    def __init__(self, note: Callable[[str], None]) -> None:
        self._note = note

    def wait(self) -> np.ndarray:
        self._note("wait")
        return np.array([1])


class Unportable(Exception):
    """Cannot be rebuilt from its arguments."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(one)


class FakeRunner:
    """Executes step numbers; its device has a queue or computes at once."""

    queued = False
    loading_error: Exception | None = None

    def __init__(self, config: EngineConfig, address: RankAddress) -> None:
        self.notes: list[str] = []

    def load(self, progress: Callable[[int, int], None]) -> str:
        for done in range(0, 1001):
            progress(done, 1000)
        if self.loading_error is not None:
            raise self.loading_error
        return "capacity"

    def execute(self, number: int) -> PendingStep:
        self.notes.append(f"execute {number}")
        ids = Late(self.notes.append) if self.queued else ReadyHostCopy(np.array([number]))
        return PendingStep(step_id=number, input_hash=0, ids=ids, logprobs=None, top_ids=None, top_logprobs=None)

    def state_hash(self, step: PendingStep, result: object) -> int:
        self.notes.append(f"answer {step.step_id}")
        return step.step_id

    def explain(self) -> list[str]:
        return list(self.notes)

    def clear_adapter(self, slot: int) -> None:
        raise (AdapterIncompatible("no such slot") if slot else Unportable(1, 2))

    def merge_adapter(self, path: str, weight: float) -> None:
        self.notes.append("merge")

    def unmerge_adapters(self) -> None:
        self.notes.append("unmerge")

    def collectives(self) -> list[tuple[str, int]]:
        return []

    def close(self) -> None:
        self.notes.append("close")


class Served:
    """A worker loop on a thread, and the parent's end of its connection."""

    def __init__(self) -> None:
        self.connection, theirs = Pipe()
        self.thread = threading.Thread(target=self._serve, args=(theirs,), daemon=True)

    def _serve(self, connection: Connection) -> None:
        worker_loop.serve(connection, CONFIG, ADDRESS, None)
        connection.close()

    def receive(self) -> tuple[Any, ...]:
        assert self.connection.poll(20)
        message: tuple[Any, ...] = self.connection.recv()
        return message

    def until_ready(self) -> list[tuple[Any, ...]]:
        messages = [self.receive()]
        while messages[-1][0] not in ("ready", "died"):
            messages.append(self.receive())
        return messages


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setattr(worker_loop, "Runner", FakeRunner)
    worker = Served()
    yield worker
    worker.connection.close()
    worker.thread.join(20)
    assert not worker.thread.is_alive(), "it ends when the parent hangs up"


@pytest.mark.parametrize("queued", [False, True], ids=["computes at once", "has a queue"])
def test_answers_come_as_soon_as_they_are_there_and_steps_are_queued_ahead_where_there_is_a_queue(
    served: Served, monkeypatch: pytest.MonkeyPatch, queued: bool
) -> None:
    monkeypatch.setattr(FakeRunner, "queued", queued)
    # Both steps wait in the connection before the worker looks.
    served.connection.send(("step", 1))
    served.connection.send(("step", 2))
    served.thread.start()
    served.until_ready()
    assert [served.receive()[0::2] for _ in range(2)] == [("result", 1), ("result", 2)]
    served.connection.send(("explain", 7))
    notes = served.receive()[3]
    if queued:
        assert notes == ["execute 1", "execute 2", "wait", "answer 1", "wait", "answer 2"]
    else:
        assert notes == ["execute 1", "answer 1", "execute 2", "answer 2"]


def test_loading_reports_a_hundred_steps_of_progress_at_most(served: Served) -> None:
    served.thread.start()
    *progress, ready = served.until_ready()
    assert ready[0::2] == ("ready", "capacity")
    assert len(progress) <= 102
    assert progress[-1] == ("progress", 1000, 1000)


@pytest.mark.parametrize(
    ("error", "portable"),
    [(ConfigurationError("bad option"), True), (OperatorError("linear", "x"), True), (Unportable(1, 2), False)],
)
def test_a_failure_to_load_is_sent_with_its_traceback(
    served: Served, monkeypatch: pytest.MonkeyPatch, error: Exception, portable: bool
) -> None:
    monkeypatch.setattr(FakeRunner, "loading_error", error)
    served.thread.start()
    kind, summary, trace, original = served.until_ready()[-1]
    assert kind == "died"
    assert summary == f"{type(error).__name__}: {error}"
    assert "Traceback" in trace
    assert (type(original) is type(error)) is portable


def test_the_error_of_a_question_answers_it_and_the_worker_goes_on(served: Served) -> None:
    served.thread.start()
    served.until_ready()
    served.connection.send(("clear", 1, 5))
    assert served.receive()[:3] == ("reply", 1, False)
    served.connection.send(("clear", 2, 0))
    _, token, succeeded, value, trace = served.receive()
    assert (token, succeeded, value) == (2, False, None)
    assert "Unportable" in trace
    served.connection.send(("step", 3))
    assert served.receive()[0] == "result"
    served.connection.send(("close", 0))
    served.thread.join(20)
    assert not served.thread.is_alive()
