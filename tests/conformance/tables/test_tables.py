"""Tables of other projects' kernels: mapped rightly, imported only when asked for, giving an operator report alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import polyaccel_conformance.tables as tables_package
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.certificate.bundle import kind_of
from polyaccel_conformance.certificate.recount import recount
from polyaccel_conformance.check import CaseResult, run_case
from polyaccel_conformance.checks.registry import CHECKS
from polyaccel_conformance.errors import ExitCode, UsageError
from polyaccel_conformance.log import read_log
from polyaccel_conformance.problems.registry import PROBLEM_SETS
from polyaccel_conformance.promises import judged, rules
from polyaccel_conformance.schedule import fixed
from polyaccel_conformance.subject import OperatorTable, Subject

FOLDER = Path(tables_package.__file__).parent
TABLES = {"liger": "liger-kernel", "flaggems": "flag-gems", "vllm": "vllm"}


def subject(name: str) -> Subject:
    return Subject(kind="table", name=name, path=str(FOLDER / f"{name}.py"))


MODULES = {"liger": "liger_kernel", "flaggems": "flag_gems", "vllm": "vllm"}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_whose_package_is_not_installed_names_the_distribution(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [module for module in sys.modules if module.startswith(f"{MODULES[name]}.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, MODULES[name], None)
    with pytest.raises(UsageError, match=f"pip install {TABLES[name]}"):
        subject(name).open()


def test_a_package_that_does_not_import_here_is_not_called_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "flag_gems.py").write_text("import nosuch_compiler\n")
    with pytest.raises(UsageError, match="'flag-gems' is installed, but 'nosuch_compiler' is not"):
        subject("flaggems").open()


@pytest.mark.parametrize("name", TABLES)
def test_every_operator_of_a_table_says_how_it_is_called(name: str, fakes: Path) -> None:
    backend = subject(name).open()
    assert isinstance(backend, OperatorTable)
    assert all(getattr(entry, "mapping", "") for entry in backend.operators().values() if hasattr(entry, "mapping"))
    assert {"rms_norm", "silu_and_mul", "gelu", "rotary_embedding"} <= set(backend.given)


def results(name: str) -> list[CaseResult]:
    """Of the first cases of each operator's fixed list that the table does not refuse, marked by its rules."""
    backend = subject(name).open()
    assert isinstance(backend, OperatorTable)
    bench, known = Bench(backend), rules(backend.operators())
    found = []
    for operator in backend.given:
        for item in fixed(PROBLEM_SETS[operator])[:45]:
            result = run_case(bench, PROBLEM_SETS[operator].problem(item.case), tuple(CHECKS.values()))
            if result.kind == "native":
                found.append(judged(result, known))
    return found


@pytest.mark.parametrize("name", TABLES)
def test_the_mapping_gives_right_results_but_for_what_was_never_promised(name: str, fakes: Path) -> None:
    found = results(name)
    assert len(found) > 100
    wrong = [(r.case.operator, f.check, f.message) for r in found for f in r.failures if not f.not_promised]
    assert wrong == []


def test_what_vllm_rounds_in_gelu_is_told_apart_from_a_pass_and_from_a_failure(fakes: Path) -> None:
    apart = [(r, f) for r in results("vllm") for f in r.failures if f.check.startswith("values.")]
    assert {r.case.operator for r, _ in apart} == {"gelu"}
    assert {r.case.dtype for r, _ in apart} == {"float16", "bfloat16"}
    assert all("gelu_new" in failure.not_promised for _, failure in apart)
    assert not any(r.wrong or r.passed for r, _ in apart)


def run(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """The command in a fresh process that prints at its end which modules of polyaccel it has imported."""
    program = (
        "import sys, json; from polyaccel_conformance.cli import main; code = main(sys.argv[1:]);"
        "print(json.dumps([name for name in sys.modules if name.startswith('polyaccel.')])); sys.exit(code)"
    )
    fakes = str(Path(__file__).with_name("fakes"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([fakes, os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """A run of vLLM's table on two operators, and its folder."""
    folder = tmp_path_factory.mktemp("run")
    words = ["run", "--table", f"{FOLDER / 'vllm.py'}:vllm", "--profile", "quick", "--operators", "gelu,linear"]
    words += ["-k", "not offset", "--checks", "values.exact,values.bound", "--no-progress", "--out", str(folder)]
    return run(words, folder), folder


def test_a_table_runs_without_an_engine(finished: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    done, _ = finished
    assert done.returncode == ExitCode.PASS, done.stdout + done.stderr
    modules = json.loads(done.stdout.splitlines()[-1])
    assert modules
    assert [name for name in modules if name.startswith(("polyaccel.engine", "polyaccel.models"))] == []


def test_the_result_of_a_table_is_an_operator_report_and_never_a_level(
    finished: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    _, folder = finished
    report = recount(read_log(folder / "results.jsonl"))
    assert report.title == "Operator report: vllm.py:vllm"
    assert report.levels == ()
    assert kind_of(report) == "report"
    assert report.result.header.out_of_scope == ("linear",)


def test_what_was_never_promised_is_neither_passed_nor_failed_in_the_report(
    finished: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    done, folder = finished
    report = recount(read_log(folder / "results.jsonl"))
    (state,) = (state for state in report.result.operators if state.operator == "gelu")
    assert (state.failed, state.verdict) == (0, "not promised")
    assert state.not_promised > 0
    assert report.result.failures == ()
    assert all("gelu_new" in group.failure.not_promised for group in report.result.not_promised)
    (check,) = (check for check in report.result.checks if check.check == "values.bound")
    assert check.verdict == "not promised"
    assert sum(cell.not_promised for cell in report.result.cells) > 0
    assert f"{state.not_promised} cases differ in what was never promised" in done.stdout
    assert "FAILED" not in done.stdout
