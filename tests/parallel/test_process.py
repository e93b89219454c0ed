"""Worker processes: they run what they are told, end with their parent, and say how they ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from polyaccel.parallel.process import WorkerProcess

ROOT = Path(__file__).resolve().parents[2]
WORKERS = "tests.parallel.workers"
PATIENCE = 60.0
"""Seconds after which something that must happen counts as not happening."""

Start = Callable[..., WorkerProcess]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts workers of :mod:`tests.parallel.workers`; none outlives the test."""
    started: list[WorkerProcess] = []

    def begin(function: str, *arguments: object, module: str = WORKERS, **options: object) -> WorkerProcess:
        worker = WorkerProcess(module, function, arguments, **options)  # type: ignore[arg-type]
        started.append(worker)
        return worker

    yield begin
    for worker in started:
        worker.stop(0.0)
        worker.close()


def receive(worker: WorkerProcess) -> object:
    assert worker.connection.poll(PATIENCE), "the worker sent nothing"
    return worker.connection.recv()


def is_running(pid: int) -> bool:
    """True while the process exists and is no zombie waiting to be collected."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def has_ended(pid: int) -> bool:
    return not is_running(pid)


def wait_until(happened: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + PATIENCE
    while not happened():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_a_worker_calls_the_function_with_the_connection_and_the_arguments(start: Start) -> None:
    worker = start("echo", 1, "two", {"three": [3.0]})
    assert receive(worker) == (1, "two", {"three": [3.0]})
    worker.connection.send(b"again")
    assert receive(worker) == b"again"
    assert worker.alive()


def test_the_pid_is_that_of_the_worker(start: Start) -> None:
    worker = start("send_pid")
    assert receive(worker) == worker.pid != os.getpid()


def test_a_worker_whose_function_returns_exits_with_code_0(start: Start) -> None:
    worker = start("send_pid")
    receive(worker)
    assert worker.exit_text(PATIENCE) == "exited with code 0"
    assert not worker.alive()


def test_a_worker_ends_when_the_parent_hangs_up(start: Start) -> None:
    worker = start("echo")
    assert receive(worker) == ()
    worker.connection.close()
    assert worker.exit_text(PATIENCE) == "exited with code 0"


def test_a_worker_whose_function_raises_exits_and_prints_the_traceback(
    start: Start, capfd: pytest.CaptureFixture[str]
) -> None:
    worker = start("raise_error")
    assert worker.connection.poll(PATIENCE)
    with pytest.raises(EOFError):
        worker.connection.recv()
    assert worker.exit_text(PATIENCE) == "exited with code 1"
    assert "ValueError: a worker's own error" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("module", "function", "error"),
    [
        ("tests.parallel.no_such_module", "echo", "ModuleNotFoundError"),
        (WORKERS, "no_such_function", "AttributeError"),
    ],
)
def test_a_worker_that_cannot_find_its_function_exits(
    start: Start, capfd: pytest.CaptureFixture[str], module: str, function: str, error: str
) -> None:
    worker = start(function, module=module)
    assert worker.exit_text(PATIENCE) == "exited with code 1"
    assert error in capfd.readouterr().err


def test_the_exit_text_names_the_exit_code(start: Start) -> None:
    assert start("leave", 7).exit_text(PATIENCE) == "exited with code 7"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGABRT])
def test_the_exit_text_names_the_signal(start: Start, number: signal.Signals) -> None:
    assert start("die", int(number)).exit_text(PATIENCE) == f"was killed by {number.name}"


def test_the_exit_text_names_a_signal_without_a_name_by_its_number(start: Start) -> None:
    nameless = signal.SIGRTMIN + 1
    assert nameless not in set(signal.Signals)
    assert start("die", nameless).exit_text(PATIENCE) == f"was killed by signal {nameless}"


def test_the_exit_text_of_a_worker_that_still_runs_says_that_it_stopped_answering(start: Start) -> None:
    worker = start("stuck")
    receive(worker)
    assert worker.exit_text(0.0) == "stopped answering"
    assert worker.alive()


def test_stop_kills_a_stuck_worker_and_may_be_called_again(start: Start) -> None:
    worker = start("stuck")
    receive(worker)
    worker.stop(0.05)
    assert not worker.alive()
    assert not is_running(worker.pid)
    assert worker.exit_text() == "was killed by SIGKILL"
    worker.stop(0.05)
    worker.close()
    worker.close()


def test_stop_lets_a_worker_end_by_itself(start: Start) -> None:
    worker = start("leave", 5)
    worker.stop(PATIENCE)
    assert worker.exit_text() == "exited with code 5"


def test_kill_ends_a_worker_and_may_be_called_again(start: Start) -> None:
    worker = start("stuck")
    receive(worker)
    worker.kill()
    assert worker.exit_text(PATIENCE) == "was killed by SIGKILL"
    worker.kill()


def test_a_worker_ignores_the_interrupt_that_a_terminal_sends_to_its_group(start: Start) -> None:
    worker = start("echo")
    receive(worker)
    os.kill(worker.pid, signal.SIGINT)
    worker.connection.send("still here")
    assert receive(worker) == "still here"


def test_the_environment_is_this_process_s_with_the_changes(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYACCEL_TEST_INHERITED", "inherited")
    changes = {"POLYACCEL_TEST_CHANGED": "changed"}
    assert receive(start("send_environment", "POLYACCEL_TEST_INHERITED", environment=changes)) == "inherited"
    assert receive(start("send_environment", "POLYACCEL_TEST_CHANGED", environment=changes)) == "changed"
    assert "POLYACCEL_TEST_CHANGED" not in os.environ


def test_a_worker_imports_what_the_parent_finds_through_sys_path(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "module_of_a_notebook.py").write_text("WHERE = 'beside the notebook'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert receive(start("send_attribute", "module_of_a_notebook", "WHERE")) == "beside the notebook"


def test_a_worker_searches_the_working_directory_only_where_the_parent_does(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    searched = receive(start("send_import_path"))
    assert isinstance(searched, list)
    assert str(ROOT) in searched
    assert not {"", str(tmp_path)} & set(searched)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    searched = receive(start("send_import_path"))
    assert isinstance(searched, list)
    assert str(tmp_path) in searched


def test_sending_to_a_worker_that_reads_nothing_fails_after_the_timeout(start: Start) -> None:
    worker = start("stuck", send_timeout=0.2)
    receive(worker)
    with pytest.raises(OSError, match="Resource temporarily unavailable"):
        worker.connection.send(bytes(64 * 2**20))


def test_a_worker_that_cannot_be_started_leaves_no_descriptor_open(monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(sys, "executable", str(ROOT / "no-such-python"))
    with pytest.raises(OSError, match="no-such-python"):
        WorkerProcess(WORKERS, "echo", ())
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_stopped_and_closed_workers_leave_no_descriptor_open() -> None:
    before = len(os.listdir("/proc/self/fd"))
    worker = WorkerProcess(WORKERS, "stuck", ())
    assert len(os.listdir("/proc/self/fd")) == before + 2
    worker.stop(0.0)
    worker.close()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("function", ["stuck", "echo"])
def test_a_worker_ends_when_its_parent_is_killed(function: str) -> None:
    script = f"""
        import time
        from polyaccel.parallel.process import WorkerProcess
        workers = [WorkerProcess({WORKERS!r}, {function!r}, ()) for _ in range(2)]
        for worker in workers:
            worker.connection.recv()
        print(*(worker.pid for worker in workers), flush=True)
        time.sleep({PATIENCE})
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert parent.stdout is not None
    try:
        workers = [int(text) for text in parent.stdout.readline().split()]
        assert len(workers) == 2
        assert all(is_running(pid) for pid in workers)
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
    for pid in workers:
        assert wait_until(partial(has_ended, pid)), f"worker {pid} outlived its parent"
