"""The suite as a test module: one star import in a plugin's own tests.

A test file imports everything from here and says what is tested::

    from polyaccel_conformance.suite import *

    BACKEND = "acme"

``PROFILE`` (default ``"quick"``), ``DEVICES`` (default 1) and ``WAIVERS`` (a TOML file, default none) may be set in the
same way. The suite runs once for the file; every operator is a test, and so are the preflight and the run as a whole.
With ``-k`` or a single test selected only the operators that are needed run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from polyaccel_conformance.certificate.recount import recount
from polyaccel_conformance.cli.blocks import failure_block
from polyaccel_conformance.log import read_log
from polyaccel_conformance.preflight.run import preflight
from polyaccel_conformance.problems.registry import PROBLEM_SETS
from polyaccel_conformance.report.model import Report
from polyaccel_conformance.report.terminal import levels
from polyaccel_conformance.results import RunResult
from polyaccel_conformance.runner import RESULTS, Options, run
from polyaccel_conformance.subject import Subject
from polyaccel_conformance.waivers import read_waivers

__all__ = [
    "conformance_outcome",
    "pytest_generate_tests",
    "test_every_check_is_conclusive_and_no_required_cell_is_empty",
    "test_operator",
    "test_preflight",
]

OPERATOR = "conformance_operator"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One run and the report that its log leads to. ``whole``: every operator was selected."""

    result: RunResult
    report: Report
    whole: bool


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each operator and each question about devices."""
    if OPERATOR in metafunc.fixturenames:
        metafunc.parametrize(OPERATOR, list(PROBLEM_SETS))


@pytest.fixture(scope="module")
def conformance_outcome(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The run, made when the first test asks for it."""
    folder = tmp_path_factory.mktemp("conformance")
    selected = _selected(request)
    whole = len(selected) == len(PROBLEM_SETS)
    result = run(
        Subject(name=_setting(request, "BACKEND", None)),
        Options(
            profile=_setting(request, "PROFILE", "quick"),
            operators=() if whole else selected,
            devices=_setting(request, "DEVICES", 1),
            folder=folder,
        ),
    )
    file = _setting(request, "WAIVERS", "")
    waivers = read_waivers(Path(request.path).parent / file) if file else ()
    return Outcome(result=result, report=recount(read_log(folder / RESULTS), waivers), whole=whole)


def _setting(request: pytest.FixtureRequest, name: str, default: Any) -> Any:
    value = getattr(request.module, name, default)
    if value is None:
        pytest.fail(f"{request.path} does not say which backend: set {name} to its name")
    return value


def _selected(request: pytest.FixtureRequest) -> tuple[str, ...]:
    items = [item for item in request.session.items if item.path == request.path]
    names = [item.callspec.params.get(OPERATOR) for item in items if hasattr(item, "callspec")]
    return tuple(str(name) for name in names if name is not None) or tuple(PROBLEM_SETS)


def test_preflight(request: pytest.FixtureRequest) -> None:
    """The backend is found and loaded, and its device has what every level needs."""
    found = preflight(Subject(name=_setting(request, "BACKEND", None)))
    assert found.passed, f"\n{found.text()}"


def test_operator(conformance_operator: str, conformance_outcome: Outcome) -> None:
    """No case of the operator fails, those aside that a waiver covers."""
    states = {state.operator: state for state in conformance_outcome.result.operators}
    state = states[conformance_operator]
    assert state.cases, state.reason
    # By what the log says: the run's own groups also show the minimal cases.
    groups = [group for group in conformance_outcome.result.failures if group.operator == conformance_operator]
    if state.failed and not conformance_outcome.report.is_waived(conformance_operator):
        pytest.fail("\n" + "\n".join(failure_block(group) for group in groups), pytrace=False)


def test_every_check_is_conclusive_and_no_required_cell_is_empty(conformance_outcome: Outcome) -> None:
    """The run as a whole; needs every operator, and is skipped when only some are selected."""
    if not conformance_outcome.whole:
        pytest.skip("not every operator is selected")
    report, result = conformance_outcome.report, conformance_outcome.result
    problems = [f"check {s.check}: {s.reason}" for s in result.checks if s.verdict == "inconclusive"]
    problems += [f"no case covers {cell}" for cell in result.empty_cells]
    problems += list(report.applied.problems)
    if problems or result.incomplete or result.device_lost:
        lines = [result.incomplete, result.device_lost, *problems, *levels(report)]
        pytest.fail("\n" + "\n".join(filter(None, lines)), pytrace=False)
