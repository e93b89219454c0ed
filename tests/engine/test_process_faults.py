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

from polyaccel import AdapterIncompatible, CommunicationError, EngineDead, OperatorError, OutOfMemory, WorkerError
from polyaccel.backend.adapter_store import SlotRange
from polyaccel.engine import process_executor
from polyaccel.engine.config import EngineConfig
from polyaccel.engine.executor import PreparedHandle
from polyaccel.engine.messages import Capacity, StepMessage, StepResult
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

    def no_room(self, why: str) -> None:
        self.theirs.send(("no_room", why))

    def broken(self) -> None:
        """What it says before it goes on with a step that it was left alone in."""
        self.theirs.send(("broken", f"CommunicationError: {BROKEN}", "Traceback of the worker", BROKEN))

    def skipped(self, step: int = 1) -> None:
        result = StepResult(step_id=step, ids=np.zeros(0, dtype=np.int64), no_room="not seen through")
        self.theirs.send(("result", result, 0))

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


# -- a rank without room -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alone_first", [True, False], ids=["the one left alone first", "the one without room first"])
def test_a_rank_left_alone_by_one_without_room_is_no_fault(start: Callable[..., Group], alone_first: bool) -> None:
    group = start()
    alone, full = group.workers
    if alone_first:
        alone.broken()
        alone.skipped()
        time.sleep(0.1)
    full.no_room("rank 1 of 2 is full")
    full.skipped()
    if not alone_first:
        time.sleep(0.1)
        alone.broken()
        alone.skipped()
    result = group.executor.collect()
    assert (result.step_id, result.no_room, len(result.ids)) == (1, "rank 1 of 2 is full", 0)
    time.sleep(process_executor.BLAME_SECONDS + 0.5)
    future = in_background(group.executor.explain)
    for worker in group.workers:
        assert worker.asked()[0] == "part"
        worker.reply({})
    assert future.result(20) == [{}, {}]


def test_a_step_that_one_rank_has_run_is_not_run_if_another_was_left_alone_in_it(start: Callable[..., Group]) -> None:
    group = start()
    alone, full = group.workers
    # Both have run it, but the news that the second finds no room for the next reaches the first too soon.
    alone.broken()
    alone.skipped(1)
    alone.skipped(2)
    full.result([4], 17)
    full.no_room("rank 1 of 2 is full")
    full.skipped(2)
    found = [group.executor.collect() for _ in range(2)]
    assert [(result.step_id, result.no_room) for result in found] == [(step, "rank 1 of 2 is full") for step in (1, 2)]


def test_ranks_meet_anew_before_a_step_resumes_and_never_at_the_same_place(start: Callable[..., Group]) -> None:
    group = start()
    places = []
    for step in (1, 2):
        group.workers[1].no_room("full")
        for worker in group.workers:
            worker.skipped(step)
        group.executor.collect()
        group.executor.submit(StepMessage(step_id=step + 1, inputs=None, resumes=True))  # type: ignore[arg-type]
        for worker in group.workers:
            assert worker.asked()[0] == "part"
            kind, place = worker.asked()
            assert kind == "meet"
            places.append(place)
            assert worker.asked()[0] == "step"
    assert places[0] == places[1] != places[2] == places[3]
    group.workers[0].result([4], 17)
    group.workers[1].result([4], 17)
    assert group.executor.collect().ids.tolist() == [4]


def test_a_rank_left_alone_for_no_reason_that_anybody_gives_ends_the_engine(start: Callable[..., Group]) -> None:
    group = start()
    for worker in group.workers:
        worker.broken()
        worker.skipped()
    cause = death(group.executor.collect).__cause__
    assert isinstance(cause, WorkerError)
    assert isinstance(cause.__cause__, CommunicationError)


def test_a_rank_killed_after_it_left_others_alone_is_blamed(start: Callable[..., Group]) -> None:
    group = start()
    group.workers[0].broken()
    group.workers[0].skipped()
    group.workers[1].vanish("was killed by SIGKILL")
    cause = death(group.executor.collect).__cause__
    assert isinstance(cause, WorkerError)
    assert (cause.rank, cause.summary) == (1, "was killed by SIGKILL")


def test_a_rank_that_cannot_be_let_go_ends_the_engine_with_what_kept_it(
    start: Callable[..., Group], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_executor, "PART_SECONDS", 0.3)
    group = start()
    group.workers[1].no_room("rank 1 of 2 is full")
    group.workers[1].skipped()
    error = death(group.executor.collect)
    assert isinstance(error.__cause__, OutOfMemory)
    assert "ranks [0] could not be let go" in str(error)
    assert "rank 1 of 2 is full" in str(error)
