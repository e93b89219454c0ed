"""A worker's loop beside a fake runner: the order of its answers, and errors that reach the parent with their type."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import pytest

from polyaccel import AdapterIncompatible, CommunicationError, ConfigurationError, OperatorError
from polyaccel.backend.backend import RankAddress
from polyaccel.backend.device import HostCopy, ReadyHostCopy
from polyaccel.engine import worker_loop
from polyaccel.engine.config import EngineConfig
from polyaccel.engine.runner import PendingStep

CONFIG = EngineConfig(model="none", backend="none")
ADDRESS = RankAddress(rank=0, world_size=1, init_method="")
SECOND = RankAddress(rank=1, world_size=2, init_method="")
BROKEN = CommunicationError("all_reduce on rank 1 of 2 was given up")


@dataclass(frozen=True)
class Message:
    """What the fake runner is asked to execute."""

    step_id: int


class Late(HostCopy):
    """A copy that notes when it is waited for."""

    def __init__(self, note: Callable[[str], None], error: Exception | None = None) -> None:
        self._note, self._error = note, error

    def wait(self) -> np.ndarray:
        self._note("wait")
        if self._error is not None:
            raise self._error
        return np.array([1])


class Unportable(Exception):
    """Cannot be rebuilt from its arguments."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(one)


class FakeRunner:
    """Executes steps; its device has a queue or computes at once. Steps find no room, or another rank away, as told."""

    queued = False
    loading_error: Exception | None = None
    without_room: tuple[int, ...] = ()
    broken: tuple[int, ...] = ()
    broken_late: tuple[int, ...] = ()
    never_meets = False

    def __init__(self, config: EngineConfig, address: RankAddress) -> None:
        self.notes: list[str] = []
        self.apart = False

    def load(self, progress: Callable[[int, int], None]) -> str:
        for done in range(0, 1001):
            progress(done, 1000)
        if self.loading_error is not None:
            raise self.loading_error
        return "capacity"

    def execute(self, message: Message) -> PendingStep:
        number = message.step_id
        if self.apart:
            return PendingStep.skipped(number, "apart")
        self.notes.append(f"execute {number}")
        if number in self.broken:
            raise BROKEN
        if number in self.without_room:
            return PendingStep.skipped(number, "full")
        late = Late(self.notes.append, BROKEN if number in self.broken_late else None)
        ids = late if self.queued else ReadyHostCopy(np.array([number]))
        return PendingStep(step_id=number, input_hash=0, ids=ids, logprobs=None, top_ids=None, top_logprobs=None)

    def state_hash(self, step: PendingStep, result: object) -> int:
        self.notes.append(f"answer {step.step_id}")
        return step.step_id

    def part(self, why: str) -> None:
        self.notes.append("part")
        self.apart = True

    def meet(self, init_method: str) -> None:
        self.notes.append(f"meet {init_method}")
        self.apart = self.never_meets
        if self.never_meets:
            raise BROKEN

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

    def __init__(self, address: RankAddress = ADDRESS) -> None:
        self.connection, theirs = Pipe()
        self.thread = threading.Thread(target=self._serve, args=(theirs, address), daemon=True)

    def _serve(self, connection: Connection, address: RankAddress) -> None:
        worker_loop.serve(connection, CONFIG, address, None)
        connection.close()

    def answers(self, *steps: int) -> list[tuple[Any, ...]]:
        """All that is said until these steps, sent at once, are answered."""
        for step in steps:
            self.connection.send(("step", Message(step)))
        if not self.thread.is_alive():
            self.thread.start()
            self.until_ready()
        found: list[tuple[Any, ...]] = []
        while [message[0] for message in found].count("result") < len(steps):
            found.append(self.receive())
        return found

    def notes(self) -> list[str]:
        self.connection.send(("explain", 7))
        reply = self.receive()
        assert reply[:3] == ("reply", 7, True)
        notes: list[str] = reply[3]
        return notes

    def receive(self) -> tuple[Any, ...]:
        assert self.connection.poll(20)
        message: tuple[Any, ...] = self.connection.recv()
        return message

    def until_ready(self) -> list[tuple[Any, ...]]:
        messages = [self.receive()]
        while messages[-1][0] not in ("ready", "died"):
            messages.append(self.receive())
        return messages


def serving(monkeypatch: pytest.MonkeyPatch, address: RankAddress) -> Iterator[Served]:
    monkeypatch.setattr(worker_loop, "Runner", FakeRunner)
    worker = Served(address)
    yield worker
    worker.connection.close()
    worker.thread.join(20)
    assert not worker.thread.is_alive(), "it ends when the parent hangs up"


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    yield from serving(monkeypatch, ADDRESS)


@pytest.fixture
def second(monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """The second of two ranks."""
    yield from serving(monkeypatch, SECOND)


@pytest.mark.parametrize("queued", [False, True], ids=["computes at once", "has a queue"])
def test_answers_come_as_soon_as_they_are_there_and_steps_are_queued_ahead_where_there_is_a_queue(
    served: Served, monkeypatch: pytest.MonkeyPatch, queued: bool
) -> None:
    monkeypatch.setattr(FakeRunner, "queued", queued)
    # Both steps wait in the connection before the worker looks.
    served.connection.send(("step", Message(1)))
    served.connection.send(("step", Message(2)))
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
    served.connection.send(("step", Message(3)))
    assert served.receive()[0] == "result"
    served.connection.send(("close", 0))
    served.thread.join(20)
    assert not served.thread.is_alive()


# -- of several ranks --------------------------------------------------------------------------------------------------


def reasons(messages: list[tuple[Any, ...]]) -> list[str]:
    """What each step was not run for; empty where it was, which this rank says by its hash alone."""
    return ["" if message[1] is None else message[1].no_room for message in messages if message[0] == "result"]


@pytest.mark.parametrize("queued", [False, True], ids=["computes at once", "has a queue"])
def test_a_rank_without_room_says_so_sees_earlier_steps_through_parts_and_skips_the_rest(
    second: Served, monkeypatch: pytest.MonkeyPatch, queued: bool
) -> None:
    monkeypatch.setattr(FakeRunner, "queued", queued)
    monkeypatch.setattr(FakeRunner, "without_room", (2,))
    messages = second.answers(1, 2, 3)
    kinds = [message[0] for message in messages]
    assert sorted(kinds) == ["no_room", "result", "result", "result"]
    assert ("no_room", "full") in messages
    assert reasons(messages) == ["", "full", "apart"]
    notes = second.notes()
    assert notes.index("answer 1") < notes.index("part")
    assert notes.count("part") == 1
    assert "execute 3" not in notes
    second.connection.send(("meet", "there"))
    assert reasons(second.answers(4)) == [""]
    assert "meet there" in second.notes()


@pytest.mark.parametrize("late", [False, True], ids=["when queued", "when waited for"])
def test_a_rank_left_alone_in_a_collective_says_so_once_parts_and_believes_nothing_it_has_queued(
    second: Served, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    monkeypatch.setattr(FakeRunner, "queued", late)
    monkeypatch.setattr(FakeRunner, "broken_late" if late else "broken", (2,))
    messages = second.answers(1, 2, 3)
    kinds = [message[0] for message in messages]
    assert kinds == ["result", "broken", "result", "result"]
    summary, trace, error = messages[1][1:]
    assert summary == f"CommunicationError: {BROKEN}"
    assert "Traceback" in trace
    assert isinstance(error, CommunicationError)
    first, *unserved = reasons(messages)
    assert first == ""
    assert all(unserved)
    assert second.notes().count("part") == 1


def test_a_rank_that_is_told_to_part_does_so_once(second: Served) -> None:
    assert reasons(second.answers(1)) == [""]
    second.connection.send(("part", "another has no room"))
    second.connection.send(("part", "another has no room"))
    assert second.notes().count("part") == 1
    assert reasons(second.answers(2)) == ["apart"]


def test_a_rank_on_its_own_has_nobody_to_part_from(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeRunner, "without_room", (1,))
    [message] = served.answers(1)
    assert message[1].no_room == "full"
    assert "part" not in served.notes()


def test_a_rank_that_another_parts_from_while_they_meet_says_so_and_skips_on(
    second: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeRunner, "never_meets", True)
    second.connection.send(("meet", "there"))
    messages = second.answers(1)
    assert [message[0] for message in messages] == ["broken", "result"]
    assert reasons(messages) == ["apart"]
