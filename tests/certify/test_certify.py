"""The program that certifies: parts that can be taken up again, a log that says what is missing, certificates only."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.certify import __main__ as program
from tests.certify.backends import BACKENDS, Installed
from tests.certify.stages import Command, Place, Ran, Stage, figures, folders_of_tests
from tests.certify.state import SOURCES, Outcome, State
from tests.project.source import ROOT


@dataclass(slots=True)
class Scripted(Stage):
    """A stage whose outcomes are written down; ``budgets``: what it was given each time."""

    name: str
    outcomes: list[str]
    budgets: list[float | None] = field(default_factory=list)

    def run(self, place: Place, budget: float | None) -> Outcome:
        self.budgets.append(budget)
        return Outcome(verdict=self.outcomes.pop(0), figures="7 cases | 0 failed", seconds=2.0)  # type: ignore[arg-type]


def run(stages: Sequence[Stage], folder: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[int, str]:
    """Exit code and log of one part."""
    monkeypatch.setattr(program, "stages", lambda seeds: list(stages))
    places = ["--work", str(folder / "work"), "--certificates", str(folder / "docs" / "certificates")]
    code = program.main([*places, *words])
    return code, (folder / "docs" / "certificates" / "log.md").read_text(encoding="utf-8")


def test_what_has_passed_is_not_run_again_and_what_is_left_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = Scripted("one", ["passed"]), Scripted("two", ["partial", "passed"])
    code, log = run([one, two], tmp_path, monkeypatch)
    assert code == 3
    assert "| two | partial | 2 | 7 cases / 0 failed |" in log
    code, log = run([one, two], tmp_path, monkeypatch)
    assert code == 0
    assert len(one.budgets) == 1
    assert "| two | passed | 4 |" in log


def test_a_failed_stage_fails_the_program_and_does_not_stop_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, log = run([Scripted("one", ["failed"]), Scripted("two", ["passed"])], tmp_path, monkeypatch)
    assert code == 1
    assert "| one | failed |" in log
    assert "| two | passed |" in log


def test_no_stage_is_begun_when_the_budget_is_spent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Scripted("one", ["passed"])
    code, log = run([stage], tmp_path, monkeypatch, "--budget", "1")
    assert (code, stage.budgets) == (3, [])
    assert "| one | not run | | |" in log


def test_outcomes_of_other_sources_are_forgotten(tmp_path: Path) -> None:
    state = State.read(tmp_path / "state.json")
    state.seeds = [1]
    state.note("one", Outcome(verdict="passed"))
    assert State.read(tmp_path / "state.json").outcomes
    state.sources = "others"
    state.write()
    assert State.read(tmp_path / "state.json").outcomes == {}
    assert State.read(tmp_path / "state.json").seeds == []


def test_all_that_the_stages_tests_import_of_the_tests_is_among_the_sources() -> None:
    known = {name.removesuffix(".py").replace("/", ".") for name in SOURCES if name.startswith("tests/")}
    for name in SOURCES:
        for path in (ROOT / name).rglob("*.py") if name.startswith("tests/") else ():
            for module in re.findall(r"^\s*(?:from|import) (tests\.[\w.]+)", path.read_text(encoding="utf-8"), re.M):
                assert any(f"{module}.".startswith(f"{place}.") for place in known), f"{path} imports {module}"
    assert "tests.conformance" in known


def test_every_backend_ten_seeds_and_every_folder_of_tests_has_a_stage() -> None:
    names = [stage.name for stage in program.stages(range(10))]
    assert {tested.name for tested in BACKENDS} == {"cpu", "composites", "folded", "simulated", "example"}
    assert sum(name.startswith("certificate ") for name in names) == len(BACKENDS)
    assert sum(name.startswith("cpu seed ") for name in names) == 10
    assert "null fails" in names
    tests = {name.removeprefix("tests ") for name in names if name.startswith("tests ")}
    assert tests == set(folders_of_tests())
    for path in (ROOT / "tests" / "conformance").rglob("test_*.py"):
        assert any((ROOT / folder) in (path, *path.parents) for folder in tests), path


def test_a_command_in_parts_is_given_the_budget_and_goes_on(tmp_path: Path) -> None:
    (tmp_path / "part.py").write_text("import sys; print(*sys.argv[1:]); sys.exit(3 if '--budget' in sys.argv else 0)")
    place = Place(work=tmp_path, certificates=tmp_path, installed=Installed(tmp_path))
    stage = Command(name="part", words=("{work}/part.py",), in_parts=True)
    first, second = stage.run(place, 100.0), stage.run(place, None)
    assert (first.verdict, first.figures) == ("partial", "--budget 80")
    assert second.verdict == "passed"


def test_a_run_is_summed_up_by_its_own_last_figures() -> None:
    ran = Ran(code=1, output="FAILED x\nFAIL: 3 cases of backend 'cpu', profile quick\nwrote b.tar.xz: a report\n")
    assert ran.verdict == "exit code 1: FAIL: 3 cases of backend 'cpu', profile quick"
    assert ran.last == "wrote b.tar.xz: a report"
    assert figures({"operators": [{"cases": 2, "failed": 1}, {"cases": 3, "failed": 0}]}) == "5 cases, 1 failed"


@pytest.mark.slow
def test_a_small_run_of_a_backend_passes_and_leaves_no_certificate(tmp_path: Path) -> None:
    """The real stage on few cases: what is partial is verified as a report, and is never put among the certificates."""
    places = ["--work", str(tmp_path / "work"), "--certificates", str(tmp_path / "docs" / "certificates")]
    more = ["--profile", "quick", "--more", "--operators select_rows", "--only", "certificate cpu"]
    assert program.main([*places, *more]) == 0
    log = (tmp_path / "docs" / "certificates" / "log.md").read_text(encoding="utf-8")
    assert "| certificate cpu | passed |" in log
    assert "report, " in log
    assert list((tmp_path / "docs" / "certificates").glob("*.xz")) == []
    assert "There is no certificate yet." in (tmp_path / "docs" / "support.md").read_text(encoding="utf-8")
