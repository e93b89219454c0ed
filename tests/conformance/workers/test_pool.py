"""The pool opens its workers side by side: what they say is scripted, so that nothing here depends on time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyaccel_conformance.errors import UsageError
from polyaccel_conformance.subject import Subject
from polyaccel_conformance.workers import pool as pool_module
from polyaccel_conformance.workers.pool import HANG, Job, Pool, WorkerLost
from polyaccel_conformance.workers.process import ForkServer, Process

CRASH = "crash: signal 11"


@dataclass(eq=False)
class _Double:
    """A worker that says what it is told to, and the far end of its connection."""

    connection: Connection
    code: int | None = None
    killed: bool = False

    @property
    def pid(self) -> int:
        return 0

    def kill(self) -> None:
        self.killed, self.code = True, -9

    def wait(self, seconds: float) -> int | None:
        return 0 if self.code is None else self.code

    def opens(self, *, fork_safe: bool = True) -> None:
        self._say({"facts": {"fork_safe": fork_safe}})

    def refuses(self, message: str) -> None:
        self._say({"error": {"type": "BackendUnavailable", "message": message}})

    def answers(self, times: int = 1, *, retire: bool = False) -> None:
        """Before it is asked: a connection holds what is not read yet."""
        for _ in range(times):
            self._say({"retire": retire})

    def dies(self, code: int) -> None:
        self.code = code
        self.connection.close()

    def asked(self) -> list[int]:
        """The jobs that it was given since the last time."""
        found = []
        while self.connection.poll():
            found.append(json.loads(self.connection.recv_bytes())["number"])
        return found

    def _say(self, message: Mapping[str, Any]) -> None:
        self.connection.send_bytes(json.dumps(message).encode())


@dataclass
class _Doubles(ForkServer):
    """Doubles in place of processes. The first opens at once; ``fork_safe``: what it says."""

    fork_safe: bool = True
    started: list[_Double] = field(default_factory=list)

    def start(
        self, target: str, arguments: Mapping[str, object], log: str = "", **_: bool
    ) -> tuple[Process, Connection]:
        ours, theirs = Pipe()
        double = _Double(theirs)
        if not self.started:
            double.opens(fork_safe=self.fork_safe)
        self.started.append(double)
        return double, ours

    def close(self) -> None:
        return None


def _pool(doubles: _Doubles, count: int) -> Pool:
    return Pool(Subject(), count=count, server=doubles)


def _jobs(count: int, seconds: float = 60.0) -> list[Job]:
    return [Job(name=number, request={"number": number}, seconds=seconds) for number in range(count)]


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool that waits for one worker alone says so soon, not after two minutes."""
    monkeypatch.setattr(pool_module, "OPEN_SECONDS", 20.0)


def test_workers_open_side_by_side_and_jobs_are_answered_meanwhile() -> None:
    doubles = _Doubles()
    with _pool(doubles, 4) as pool:
        pool.start()
        assert len(doubles.started) == 1, "its facts decide how the others are started"
        first = doubles.started[0]
        first.answers(10)
        answers = pool.run(_jobs(10))
        assert [answer.job.name for answer in islice(answers, 5)] == [0, 1, 2, 3, 4]
        assert len(doubles.started) == 4, "the others were not begun at once"
        third = doubles.started[2]
        third.opens()
        third.answers(10)
        assert {answer.job.name for answer in answers} == {5, 6, 7, 8, 9}
        late = third.asked()
        assert late
        assert sorted(first.asked() + late) == list(range(10))
        assert not any(doubles.started[index].asked() for index in (1, 3))


@given(order=st.permutations(range(1, 5)))
def test_jobs_wait_in_order_whichever_worker_opens_first(order: Sequence[int]) -> None:
    doubles = _Doubles()
    with _pool(doubles, 5) as pool:
        pool.start()
        doubles.started[0].answers()
        answers = pool.run(_jobs(6))
        assert next(answers).job.name == 0
        found = []
        for index in order:
            # The first is at job 1 until the end; each of these takes one job and goes.
            doubles.started[index].opens()
            doubles.started[index].answers(retire=True)
            found.append(next(answers).job.name)
        assert found == [2, 3, 4, 5]


def test_no_more_workers_are_begun_than_jobs_wait_for() -> None:
    doubles = _Doubles()
    with _pool(doubles, 8) as pool:
        pool.start()
        doubles.started[0].answers(3)
        assert len(list(pool.run(_jobs(3)))) == 3
        assert len(doubles.started) == 3, "one takes the first job, two come for the others"
        doubles.started[0].answers(2)
        assert len(list(pool.run(_jobs(2)))) == 2
        assert len(doubles.started) == 3, "those that still open are not counted"


def test_a_worker_that_opens_after_its_run_serves_the_next() -> None:
    doubles = _Doubles()
    with _pool(doubles, 2) as pool:
        pool.start()
        first = doubles.started[0]
        first.answers(2)
        assert len(list(pool.run(_jobs(2)))) == 2
        second = doubles.started[1]
        second.opens()
        second.answers(2)
        answers = pool.run(_jobs(3))
        assert {next(answers).job.name, next(answers).job.name} == {1, 2}, "the first was given job 0 and is at it"
        first.answers()
        assert [answer.job.name for answer in answers] == [0]


def test_a_worker_that_never_opens_loses_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "OPEN_SECONDS", 0.2)
    doubles = _Doubles()
    with _pool(doubles, 2) as pool:
        pool.start()
        doubles.started[0].answers(2)
        answers = pool.run(_jobs(4))
        assert [next(answers).job.name, next(answers).job.name] == [0, 1]
        with pytest.raises(WorkerLost, match=r"did not open within 0\.2 s"):
            next(answers)
        assert doubles.started[1].killed
        assert not doubles.started[0].killed


def test_a_worker_that_dies_while_it_opens_loses_the_run_after_the_answers_that_have_come() -> None:
    doubles = _Doubles()
    with _pool(doubles, 3) as pool:
        pool.start()
        doubles.started[0].answers()
        answers = pool.run(_jobs(6))
        assert next(answers).job.name == 0
        doubles.started[1].dies(-11)
        doubles.started[0].answers()
        assert next(answers).job.name == 1
        with pytest.raises(WorkerLost, match="ended its process: crash: signal 11"):
            next(answers)


def test_a_worker_that_cannot_open_gives_its_reason() -> None:
    doubles = _Doubles()
    with _pool(doubles, 2) as pool:
        pool.start()
        doubles.started[0].answers()
        answers = pool.run(_jobs(3))
        next(answers)
        doubles.started[1].refuses("the device is gone")
        with pytest.raises(WorkerLost, match="cannot be opened: BackendUnavailable: the device is gone"):
            next(answers)


def test_a_hang_is_seen_while_another_worker_opens() -> None:
    doubles = _Doubles()
    with _pool(doubles, 2) as pool:
        pool.start()
        answers = pool.run(_jobs(2, seconds=0.1))
        answer = next(answers)
        assert (answer.job.name, answer.died) == (0, HANG)
        assert doubles.started[0].killed
        assert not doubles.started[1].killed
        doubles.started[1].opens()
        doubles.started[1].answers()
        (other,) = answers
        assert (other.job.name, other.died) == (1, "")


@pytest.mark.parametrize("how", ["retired", "dead"])
def test_another_worker_comes_for_one_that_is_gone_while_the_others_answer(how: str) -> None:
    doubles = _Doubles()
    with _pool(doubles, 2) as pool:
        pool.start()
        first = doubles.started[0]
        first.answers()
        answers = pool.run(_jobs(8))
        next(answers)
        second = doubles.started[1]
        second.opens()
        second.answers(5)
        if how == "retired":
            first.answers(retire=True)
        else:
            first.dies(-11)
        found = list(islice(answers, 6))
        assert sorted(answer.job.name for answer in found) == [1, 2, 3, 4, 5, 6]  # type: ignore[type-var]
        assert [answer.died for answer in found if answer.job.name == 1] == ["" if how == "retired" else CRASH]
        assert len(doubles.started) == 3
        doubles.started[2].opens()
        second.answers()
        doubles.started[2].answers()
        assert [answer.job.name for answer in answers] == [7]


def test_workers_that_open_and_die_without_end_lose_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "MAX_IN_A_ROW", 3)

    class Dying(_Doubles):
        def start(
            self, target: str, arguments: Mapping[str, object], log: str = "", **_: bool
        ) -> tuple[Process, Connection]:
            process, connection = super().start(target, arguments, log)
            double = self.started[-1]
            if len(self.started) > 1:
                double.opens()
            double.dies(-6)
            return process, connection

    doubles = Dying()
    with _pool(doubles, 2) as pool:
        pool.start()
        with pytest.raises(WorkerLost, match="4 workers in a row did not survive a case"):
            list(pool.run(_jobs(100)))
        # Two first ones, the one after them that is not counted, and three in a row.
        assert len(doubles.started) == 6


def test_the_first_worker_that_does_not_open_is_an_error_of_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "OPEN_SECONDS", 0.1)
    doubles = _Doubles()
    monkeypatch.setattr(_Double, "opens", lambda self, fork_safe: None)
    with _pool(doubles, 2) as pool:
        for _ in range(2):
            with pytest.raises(UsageError, match="did not open"):
                pool.start()
        assert [double.killed for double in doubles.started] == [True, True]


def test_what_cannot_follow_a_fork_is_started_afresh_once(monkeypatch: pytest.MonkeyPatch) -> None:
    forked, afresh = _Doubles(fork_safe=False), _Doubles(fork_safe=False)
    monkeypatch.setattr(pool_module, "Spawn", lambda: afresh)
    with _pool(forked, 1) as pool:
        assert pool.start() == {"fork_safe": False}
        assert (len(forked.started), len(afresh.started)) == (1, 1)
        afresh.started[0].dies(-11)
        assert pool.ask(_jobs(1)[0]).died == CRASH
        afresh.started.clear()
        pool.start()
        assert (len(forked.started), len(afresh.started)) == (1, 1), "it was asked again whether it can"


def test_a_closed_pool_ends_workers_that_still_open() -> None:
    doubles = _Doubles()
    with _pool(doubles, 3) as pool:
        pool.start()
        doubles.started[0].answers()
        answers: Iterator[object] = pool.run(_jobs(3))
        next(answers)
    assert [double.killed for double in doubles.started] == [False, True, True]
