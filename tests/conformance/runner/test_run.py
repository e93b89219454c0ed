"""Runs end to end on tables: what is planted is found, made minimal, written, and shown again by ``replay``."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from polyaccel.backend import load
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.casefile import CaseFile, Outcome, Replay
from polyaccel_conformance.dump import arrays
from polyaccel_conformance.errors import ExitCode, UsageError
from polyaccel_conformance.log import read_log
from polyaccel_conformance.replay import Archive
from polyaccel_conformance.replay import dump_case as dump_in_worker
from polyaccel_conformance.replay import replay as replay_in_worker
from polyaccel_conformance.results import FailureGroup, RunResult
from polyaccel_conformance.runner import RESULTS, WORKER, Options, Watch
from polyaccel_conformance.runner import run as run_suite
from polyaccel_conformance.standalone import write_standalone
from polyaccel_conformance.subject import Subject
from polyaccel_conformance.workers.process import ForkServer

TABLES = str(Path(__file__).with_name("tables.py"))
VALUES = ("values.exact", "values.bound")
FAST = Options(profile="quick", checks=VALUES, operators=("layer_norm",))


SERVER = ForkServer()
"""Imports torch once for all runs of this file."""


@pytest.fixture(scope="module", autouse=True)
def _server() -> Iterator[None]:
    yield
    SERVER.close()


def run(subject: Subject, options: Options, watch: Watch | None = None) -> RunResult:
    return run_suite(subject, options, watch, SERVER)


def replay(file: CaseFile) -> Replay:
    return replay_in_worker(file, server=SERVER)


def dump_case(file: CaseFile) -> Archive:
    return dump_in_worker(file, SERVER)


def table(name: str) -> Subject:
    return Subject(kind="table", name=name, path=TABLES)


class Watching:
    """Keeps what a run says while it goes on."""

    def __init__(self) -> None:
        self.done: list[int] = []
        self.failures: list[FailureGroup] = []

    def progress(self, done: int, expected: int, failed: int, now: str) -> None:
        assert done <= expected
        self.done.append(done)

    def failure(self, group: FailureGroup) -> None:
        self.failures.append(group)


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunResult, Path]:
    """A run on a table that is wrong in column 2 of rows of three and more."""
    folder = tmp_path_factory.mktemp("wrong")
    return run(table("WRONG"), replace(FAST, folder=folder)), folder


def test_a_right_table_passes(tmp_path: Path) -> None:
    watch = Watching()
    result = run(table("RIGHT"), replace(FAST, folder=tmp_path, operators=()), watch)
    assert result.exit_code is ExitCode.PASS, result.checks
    assert watch.done == list(range(1, result.cases + 1))
    assert watch.failures == []
    assert result.header.operators == ("layer_norm",)
    assert "linear" in result.header.out_of_scope
    assert {state.verdict for state in result.checks} == {"passed"}
    (state,) = (state for state in result.operators if state.operator == "layer_norm")
    assert state.cases == state.planned > 100
    assert dict(state.kinds) == {"native": state.cases}
    assert 0 < max(state.headroom.values()) <= 1
    assert sum(cell.cases for cell in result.cells) > state.cases
    log = read_log(tmp_path / RESULTS)
    assert log.ended
    assert len(log.results) == result.cases
    assert {phase for phase, _ in log.results} >= {"covering", "drawn"}


def test_a_planted_error_is_found_and_made_minimal(wrong: tuple[RunResult, Path]) -> None:
    result, _ = wrong
    assert result.exit_code is ExitCode.FAIL
    assert {group.check for group in result.failures} == set(VALUES)
    for group in result.failures:
        assert group.result.case.dim("hidden") == 3, "columns 0 and 1 are right"
        assert group.result.case.dim("tokens") == 1
        assert group.failure.index[-1] == 2
        assert group.shrink_seconds < 60
        assert group.cases > 1


def test_its_case_file_is_replayed_as_reproduced(wrong: tuple[RunResult, Path]) -> None:
    result, _ = wrong
    file = CaseFile.read(Path(result.failures[0].path))
    assert file.revision_changes() == []
    assert file.environment["torch"]
    found = replay(file)
    assert found.outcome is Outcome.REPRODUCED
    assert found.inputs_identical
    assert found.same_output
    assert found.exit_code is ExitCode.FAIL


def test_on_a_right_backend_it_is_not_reproduced(wrong: tuple[RunResult, Path]) -> None:
    result, _ = wrong
    found = replay(replace(CaseFile.read(Path(result.failures[0].path)), subject=Subject(name="cpu")))
    assert found.outcome is Outcome.NOT_REPRODUCED
    assert found.inputs_identical
    assert not found.same_output
    assert found.exit_code is ExitCode.PASS


def test_another_cause_is_a_different_failure(wrong: tuple[RunResult, Path]) -> None:
    result, _ = wrong
    file = CaseFile.read(Path(result.failures[0].path))
    found = replay(replace(file, failure=replace(file.failure, cause="another")))
    assert found.outcome is Outcome.DIFFERENT_FAILURE
    assert found.exit_code is ExitCode.DIFFERENT_FAILURE


def test_other_inputs_are_named_and_a_pass_on_them_proves_nothing(wrong: tuple[RunResult, Path]) -> None:
    result, _ = wrong
    file = CaseFile.read(Path(result.failures[0].path))
    found = replay(replace(file, subject=Subject(name="cpu"), digests={**file.digests, "x": "0" * 32}))
    assert found.differing == ("x",)
    assert found.exit_code is ExitCode.INCONCLUSIVE


def test_a_dump_holds_inputs_expected_values_and_outputs(wrong: tuple[RunResult, Path]) -> None:
    result, _ = wrong
    archive = dump_case(CaseFile.read(Path(result.failures[0].path)))
    assert {"input.x", "input.weight", "expected.y", "tolerance.y", "got.y", "case"} <= set(archive)
    far = np.abs(archive["got.y"] - archive["expected.y"]) > archive["tolerance.y"]
    assert np.flatnonzero(far.any(axis=tuple(range(far.ndim - 1)))).tolist() == [2]


def test_a_standalone_script_needs_neither_the_suite_nor_the_project(
    wrong: tuple[RunResult, Path], tmp_path: Path
) -> None:
    from polyaccel_conformance.problems.registry import PROBLEM_SETS

    result, _ = wrong
    file = CaseFile.read(Path(result.failures[0].path))
    script = tmp_path / "case.py"
    write_standalone(script, file, PROBLEM_SETS["layer_norm"].problem(file.case), dump_case(file))
    (tmp_path / "kernel.py").write_text(
        "import torch\n"
        "def right(inputs, case):\n"
        "    x, weight, bias = inputs['x'].double(), inputs['weight'].double(), inputs.get('bias')\n"
        "    y = (x - x.mean(-1, keepdim=True)) * (x.var(-1, correction=0, keepdim=True) "
        "+ case['attributes.eps']).rsqrt() * weight\n"
        "    return (y if bias is None else y + bias.double()).to(inputs['x'].dtype)\n"
        "def wrong(inputs, case):\n"
        "    return right(inputs, case) + 64\n"
    )
    codes = {}
    for arguments in ((), ("kernel.py:right",), ("kernel.py:wrong",)):
        # Isolated: only the standard library and site-packages can be imported.
        command = [sys.executable, "-I", "-X", "importtime", str(script), *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert "polyaccel" not in [line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines()]
        codes[arguments] = done.returncode
    assert codes == {(): 1, ("kernel.py:right",): 0, ("kernel.py:wrong",): 1}


def test_an_archive_holds_all_that_a_kernel_with_a_step_needs() -> None:
    from polyaccel_conformance.problems.registry import PROBLEM_SETS
    from polyaccel_conformance.schedule import fixed

    problems = PROBLEM_SETS["sgmv"]
    case = next(i.case for i in fixed(problems) if i.case.dtype == "float32" and i.case.structure["segments"] == "each")
    found = arrays(Bench(load("cpu")), problems.problem(case))
    rows, slots, mixes = (
        found[f"input.step.{case.attributes['row_set']}.{p}"].tolist() for p in ("rows", "slots", "weights")
    )
    floats = {name: values.astype(np.float64) for name, values in found.items() if values.dtype.kind in "fiu"}
    y = floats["input.y"].copy()
    ends = np.cumsum(json.loads(str(found["attributes"]))["weight"]["slices"])
    for row, slot, mix in zip(rows, slots, mixes, strict=True):
        for piece, end in enumerate(ends):
            a, b = (floats.get(f"input.adapters.adapters.{int(slot)}.{piece}.{m}") for m in "ab")
            if a is not None and b is not None:
                start = 0 if piece == 0 else ends[piece - 1]
                y[int(row), start:end] += mix * (b @ (a @ floats["input.x"][int(row)]))
    assert len(rows) > 0
    assert np.all(np.abs(y - floats["expected.y"]) <= floats["tolerance.y"])


def test_a_worker_that_dies_fails_its_cases_and_the_run_goes_on(tmp_path: Path) -> None:
    result = run(table("DIES"), replace(FAST, folder=tmp_path))
    (group,) = result.failures
    assert (group.check, group.cause) == (WORKER, "crash: signal 11")
    assert group.result.case.dim("hidden") == 1
    assert "dies_with_a_bias" in group.failure.message, "the message says where"
    assert group.shrink_seconds < 60
    (state,) = (state for state in result.operators if state.operator == "layer_norm")
    assert state.failed < state.cases
    assert result.exit_code is ExitCode.FAIL
    assert replay(CaseFile.read(Path(group.path))).outcome is Outcome.REPRODUCED


def test_a_device_that_a_case_has_left_in_a_bad_state_is_not_given_to_the_next_case() -> None:
    result = run(table("Poisoned"), replace(FAST, operators=("rms_norm",), shrink=False))
    (state,) = result.operators
    wrong = {(group.check, group.cause) for group in result.failures}
    assert wrong == {("values.exact", "error"), ("values.bound", "error")}
    assert 0 < state.failed < state.cases / 2, "only the cases of one dtype"


def test_a_device_that_never_recovers_ends_the_run_as_lost() -> None:
    result = run(table("Lost"), replace(FAST, operators=("rms_norm",), shrink=False))
    assert result.exit_code is ExitCode.DEVICE_LOST
    assert "in a row" in result.device_lost


def test_a_worker_that_hangs_is_ended_and_its_case_fails(tmp_path: Path) -> None:
    options = replace(FAST, folder=tmp_path, timeout=0.5, selection="dtype=float16 and dims.hidden=2", shrink=False)
    result = run(table("HANGS"), options)
    assert {(group.check, group.cause) for group in result.failures} == {(WORKER, "hang")}


class Interrupting(Watching):
    """Ctrl-C after some cases."""

    def progress(self, done: int, expected: int, failed: int, now: str) -> None:
        super().progress(done, expected, failed, now)
        if done == 40:
            raise KeyboardInterrupt


def test_a_run_is_taken_up_where_it_was_broken_off(tmp_path: Path) -> None:
    options = replace(FAST, folder=tmp_path)
    first = run(table("RIGHT"), options, Interrupting())
    assert first.exit_code is ExitCode.INCONCLUSIVE
    assert first.incomplete == "interrupted"
    again = run(table("RIGHT"), replace(options, resume=True))
    assert again.incomplete == ""
    assert again.exit_code is ExitCode.PASS, again.checks
    assert read_log(tmp_path / RESULTS).ended
    lines = [json.loads(line) for line in (tmp_path / RESULTS).read_text().splitlines()]
    keys = [json.dumps(line["case"]) for line in lines if line["type"] == "case"]
    assert len(keys) == len(set(keys)) == again.cases > first.cases == 40
    with pytest.raises(UsageError, match="another run"):
        run(table("RIGHT"), replace(options, seed=5, resume=True))


def test_a_run_without_time_left_says_how_to_go_on() -> None:
    result = run(table("RIGHT"), replace(FAST, budget=0.0))
    assert result.cases == 0
    assert "--resume" in result.incomplete
    assert result.exit_code is ExitCode.INCONCLUSIVE


def test_only_what_failed_is_run_again(wrong: tuple[RunResult, Path]) -> None:
    first, folder = wrong
    failed = sum(state.failed for state in first.operators)
    again = run(table("WRONG"), replace(FAST, folder=folder, failed=True, shrink=False))
    assert again.cases == failed == sum(state.failed for state in again.operators)


def test_a_run_stops_at_the_first_failure_of_a_named_check() -> None:
    result = run(table("WRONG"), replace(FAST, stop_at="values.exact", shrink=False))
    assert result.exit_code is ExitCode.FAIL
    assert "values.exact" in result.incomplete
    assert result.cases < 150


def test_the_same_seed_runs_the_same_cases_and_certify_draws_a_fresh_one(tmp_path: Path) -> None:
    options = replace(FAST, selection="dtype=float16 and data=normal", checks=("values.bound",))
    keys = []
    for seed in (3, 3, 4):
        run(table("RIGHT"), replace(options, seed=seed, folder=tmp_path))
        keys.append({r.case.key for _, r in read_log(tmp_path / RESULTS).results})
    assert keys[0] == keys[1] != keys[2]
    certify = replace(options, profile="certify", budget=0.0)
    seeds = {run(table("RIGHT"), certify).header.seed for _ in range(2)}
    assert len(seeds) == 2


def test_a_backend_that_cannot_follow_a_fork_is_started_afresh() -> None:
    options = replace(FAST, operators=("rms_norm",), selection="dtype=float32 and data=normal", workers=1)
    result = run(table("Spawned"), options)
    assert result.exit_code is ExitCode.PASS, result.checks
    assert {kind for state in result.operators for kind in state.kinds} == {"native"}


@pytest.mark.parametrize(
    ("subject", "options", "message"),
    [
        (Subject(name="no-such"), FAST, "no backend 'no-such' is installed"),
        (table("NUMBER"), FAST, "expected a mapping or a Backend"),
        (table("ABSENT"), FAST, "has no 'ABSENT'"),
        (Subject(kind="table", name="T", path="/nowhere/t.py"), FAST, "is not a file"),
        (table("RIGHT"), replace(FAST, operators=("linear",)), "holds none of the operators"),
        (table("RIGHT"), replace(FAST, operators=("no_such",)), "unknown operator no_such"),
        (table("RIGHT"), replace(FAST, checks=("no_such",)), "unknown check no_such"),
        (table("RIGHT"), replace(FAST, selection="dtype=float99"), "nothing is selected"),
        (table("RIGHT"), replace(FAST, selection="and"), "-k"),
        (table("RIGHT"), replace(FAST, devices=99), "--devices 99"),
        (table("RIGHT"), replace(FAST, profile="slow"), "no profile 'slow'"),
        (table("RIGHT"), replace(FAST, failed=True), "--failed needs"),
    ],
)
def test_what_cannot_be_run_is_a_usage_error_that_says_why(subject: Subject, options: Options, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run(subject, options)


def test_a_table_that_raises_when_it_is_run_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import no_such_module\n")
    with pytest.raises(UsageError, match="ModuleNotFoundError"):
        run(Subject(kind="table", name="TABLE", path=str(tmp_path / "broken.py")), FAST)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 1}'])
def test_a_file_that_is_no_case_file_is_a_usage_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "case.json"
    path.write_text(text)
    with pytest.raises(UsageError, match="case file"):
        CaseFile.read(path)


def test_a_check_that_the_device_cannot_be_asked_is_recorded_with_the_reason() -> None:
    result = run(Subject(kind="backend", name="cpu"), Options(profile="quick", operators=("silu_and_mul",)))
    (state,) = (check for check in result.checks if check.check == "device.wrong_current")
    assert (state.cases, state.verdict) == (0, "not exercised")
    assert state.control == f"impossible here: {state.reason}"
