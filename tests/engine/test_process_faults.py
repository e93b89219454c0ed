"""The process executor against workers that misbehave in a chosen order: whom it blames, and that it never hangs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import pytest

from polyaccel import AdapterIncompatible, CommunicationError, EngineDead, OperatorError, WorkerError
from polyaccel.backend.adapter_store import SlotRange
from polyaccel.engine import process_executor
from polyaccel.engine.config import EngineConfig
from polyaccel.engine.executor import PreparedHandle
from polyaccel.engine.messages import Capacity, StepResult
from polyaccel.engine.process_executor import ProcessExecutor

CAPACITY = Capacity(
    kv_blocks=4,
    kv_block_size=4,
    request_slots=2,
    max_model_len=16,
    vocabulary=9,
    adapter_slots=1,
    rank_rows=8,
    world_size=2,
)
BROKEN = CommunicationError("all_reduce on rank 0 of 2 failed")


class FakeWorker:
    """A worker whose end of the connection is the test's."""

    def __init__(self, *arguments: object, **options: object) -> None:
        self.connection, self.theirs = Pipe()
        self.pid = id(self)
        self.ending = "exited with code 0"
        self.killed = False

    def exit_text(self, timeout: float = 2.0) -> str:
        return self.ending

    def kill(self) -> None:
        self.killed = True

    def stop(self, timeout: float) -> None:
        self.theirs.close()

    def close(self) -> None:
        self.connection.close()

    def ready(self) -> None:
        self.theirs.send(("ready", self.pid, CAPACITY))

    def died(self, error: Exception) -> None:
        """What a worker sends last."""
        self.theirs.send(("died", f"{type(error).__name__}: {error}", "Traceback of the worker", error))

    def vanish(self, ending: str) -> None:
        self.ending = ending
        self.theirs.close()

    def result(self, ids: list[int], state_hash: int) -> None:
        self.theirs.send(("result", StepResult(step_id=1, ids=np.array(ids)), state_hash))

    def asked(self) -> tuple[Any, ...]:
        message: tuple[Any, ...] = self.theirs.recv()
        return message

    def reply(self, value: object, succeeded: bool = True) -> None:
        """Answer the next question."""
        self.theirs.send(("reply", self.asked()[1], succeeded, value, ""))


class Group:
    """An executor over two fake workers."""

    def __init__(self, executor: ProcessExecutor, workers: list[FakeWorker]) -> None:
        self.executor, self.workers = executor, workers


def config(timeout: float = 30.0) -> EngineConfig:
    return EngineConfig(model="none", backend="none", tensor_parallel_size=2, timeout=timeout)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> list[FakeWorker]:
    made: list[FakeWorker] = []

    def make(*arguments: object, **options: object) -> FakeWorker:
        made.append(FakeWorker())
        return made[-1]

    monkeypatch.setattr(process_executor, "WorkerProcess", make)
    return made


@pytest.fixture
def start(fakes: list[FakeWorker]) -> Iterator[Callable[..., Group]]:
    groups: list[Group] = []

    def starting(timeout: float = 30.0) -> Group:
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(ProcessExecutor, config(timeout))
            while len(fakes) < 2:
                time.sleep(0.001)
            for worker in fakes:
                worker.ready()
            groups.append(Group(future.result(20), fakes))
        return groups[-1]

    yield starting
    for group in groups:
        group.executor.close()
        assert not [thread for thread in threading.enumerate() if thread.name == "polyaccel-receiver"]


def death(call: Callable[[], object]) -> EngineDead:
    with pytest.raises(EngineDead) as caught:
        call()
    return caught.value


def in_background(call: Callable[[], object]) -> Future[object]:
    future: Future[object] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def test_a_killed_rank_is_blamed_even_if_another_reports_its_broken_collective_first(
    start: Callable[..., Group],
) -> None:
    group = start()
    group.workers[0].died(BROKEN)
    group.workers[0].vanish("exited with code 0")
    time.sleep(0.3)
    group.workers[1].vanish("was killed by SIGKILL")
    cause = death(group.executor.collect).__cause__
    assert isinstance(cause, WorkerError)
    assert (cause.rank, cause.summary) == (1, "was killed by SIGKILL")
    assert all(worker.killed for worker in group.workers)


def test_a_rank_with_an_error_of_its_own_is_blamed_even_if_it_reports_last(start: Callable[..., Group]) -> None:
    group = start()
    group.workers[0].died(BROKEN)
    group.workers[1].died(OperatorError("linear", "out of range"))
    cause = death(group.executor.collect).__cause__
    assert isinstance(cause, WorkerError)
    assert cause.rank == 1
    assert isinstance(cause.__cause__, OperatorError)


@pytest.mark.parametrize("both", [True, False], ids=["both report", "one reports"])
def test_if_nobody_else_is_to_blame_the_first_report_is_the_cause(start: Callable[..., Group], both: bool) -> None:
    group = start()
    group.workers[0].died(BROKEN)
    if both:
        time.sleep(0.1)
        group.workers[1].died(CommunicationError("all_reduce on rank 1 of 2 failed"))
    cause = death(group.executor.collect).__cause__
    assert isinstance(cause, WorkerError)
    assert cause.rank == 0
    assert cause.traceback_text == "Traceback of the worker"
    assert str(cause.__cause__) == str(BROKEN)


def test_ranks_that_disagree_after_a_step_are_not_believed(start: Callable[..., Group]) -> None:
    group = start()
    for worker in group.workers:
        worker.result([4], 17)
    assert group.executor.collect().ids.tolist() == [4]
    group.workers[0].result([4], 17)
    group.workers[1].result([5], 18)
    error = death(group.executor.collect)
    assert isinstance(error.__cause__, CommunicationError)
    assert "[17, 18]" in str(error)


def test_a_result_is_taken_only_when_every_rank_has_one(start: Callable[..., Group]) -> None:
    group = start()
    future = in_background(group.executor.collect)
    group.workers[0].result([4], 1)
    time.sleep(0.05)
    assert not future.done()
    group.workers[1].result([4], 1)
    result = future.result(20)
    assert isinstance(result, StepResult)


def test_a_rank_that_does_not_answer_a_question_is_named(start: Callable[..., Group]) -> None:
    group = start(timeout=0.3)
    future = in_background(lambda: group.executor.clear_adapter(0))
    group.workers[0].reply(None)
    error = future.exception(20)
    assert isinstance(error, EngineDead)
    assert "rank 1 did not answer within 0.3 s" in str(error)


def test_an_error_of_one_rank_is_raised_after_all_have_answered_and_forgotten_on_all(
    start: Callable[..., Group],
) -> None:
    group = start()
    future = in_background(lambda: group.executor.prepare_adapter("somewhere"))
    group.workers[0].reply(8)
    time.sleep(0.05)
    assert not future.done()
    group.workers[1].reply(AdapterIncompatible("does not fit"), succeeded=False)
    assert [worker.asked()[0] for worker in group.workers] == ["discard", "discard"]
    for worker in group.workers:
        worker.theirs.send(("reply", 2, True, None, ""))
    assert isinstance(future.exception(20), AdapterIncompatible)


def test_an_adapter_that_ranks_plan_differently_ends_the_engine(start: Callable[..., Group]) -> None:
    group = start()
    where = SlotRange(slot=0, first_rank_row=0, rank_rows=8)
    handle = PreparedHandle(token=1, max_rank=8)
    future = in_background(lambda: group.executor.commit_adapter(handle, "name", where, 1))
    group.workers[0].reply((None, "one plan"))
    group.workers[1].reply((None, "another plan"))
    error = future.exception(20)
    assert isinstance(error, EngineDead)
    assert "planned adapter 'name' differently" in str(error)


def test_an_answer_that_comes_after_the_death_is_ignored(start: Callable[..., Group]) -> None:
    group = start()
    future = in_background(group.executor.explain)
    token = group.workers[0].asked()[1]
    group.workers[1].died(OperatorError("linear", "out of range"))
    assert isinstance(future.exception(20), EngineDead)
    group.workers[0].theirs.send(("reply", token, True, {}, ""))
    time.sleep(0.1)
    assert [thread.name for thread in threading.enumerate()].count("polyaccel-receiver") == 1


def test_closing_answers_whoever_still_waits(start: Callable[..., Group]) -> None:
    group = start()
    future = in_background(group.executor.explain)
    group.workers[0].asked()
    group.executor.close()
    assert isinstance(future.exception(20), EngineDead)
    assert "closed" in str(death(group.executor.explain))


def test_a_worker_that_takes_no_message_is_blamed_for_what_it_died_of(start: Callable[..., Group]) -> None:
    group = start()
    group.workers[1].ending = "was killed by SIGSEGV"
    group.workers[1].theirs.close()
    assert "rank 1: was killed by SIGSEGV" in str(death(lambda: group.executor.unmerge_adapters()))


class Unreadable:
    """Fails when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return int, ("not a number",)


def test_a_message_that_cannot_be_read_is_reported(start: Callable[..., Group]) -> None:
    group = start()
    group.workers[1].theirs.send(Unreadable())
    assert "rank 1: sent what cannot be read" in str(death(group.executor.collect))


def test_a_rank_that_says_nothing_while_it_loads_is_given_up(
    fakes: list[FakeWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_executor, "START_SECONDS", 0.2)
    future = in_background(lambda: ProcessExecutor(config(timeout=0.1)))
    while len(fakes) < 2:
        time.sleep(0.001)
    fakes[0].ready()
    error = future.exception(20)
    assert isinstance(error, EngineDead)
    assert "ranks [1] reported nothing for 0.2 s while loading" in str(error)


def test_steps_and_questions_of_several_threads_never_mix(start: Callable[..., Group]) -> None:
    group = start()
    payload = "x" * 200_000
    received: list[list[int]] = [[], []]

    def read(connection: Connection, into: list[int]) -> None:
        for _ in range(200):
            message = connection.recv()
            assert message[2] == payload
            into.append(message[1])
            connection.send(("reply", message[1], True, 1, ""))

    readers = [
        threading.Thread(target=read, args=(worker.theirs, into))
        for worker, into in zip(group.workers, received, strict=True)
    ]
    for reader in readers:
        reader.start()
    with ThreadPoolExecutor(4) as pool:
        handles = list(pool.map(lambda _: group.executor._ask("prepare", payload)[0], range(200)))
    for reader in readers:
        reader.join(30)
    assert received[0] == received[1]
    assert sorted(handles) == sorted(received[0]) == list(range(1, 201))
