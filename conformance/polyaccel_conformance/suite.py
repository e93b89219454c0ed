"""The suite inside a plugin's own tests: one file that holds two lines.

    from polyaccel_conformance.suite import *

    BACKEND = "mine"

The backend is run once; then every operator and every check is a test. ``PROFILE``, ``DEVICES`` and ``TABLE``
(``FILE.py:NAME``, instead of ``BACKEND``) may be set in the same way. The options ``--conformance-profile`` and
``--conformance-devices`` exist where the line also stands in a ``conftest.py``, and win. The variable
``POLYACCEL_CONFORMANCE_PROFILE`` comes before what the file says.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from polyaccel_conformance.checks.registry import CHECKS
from polyaccel_conformance.cli.blocks import failure_block
from polyaccel_conformance.errors import UsageError
from polyaccel_conformance.problems.registry import PROBLEM_SETS
from polyaccel_conformance.results import RunResult
from polyaccel_conformance.runner import Options, run
from polyaccel_conformance.subject import Subject

__all__ = [
    "conformance_options",
    "conformance_run",
    "conformance_subject",
    "pytest_addoption",
    "pytest_generate_tests",
    "test_conformance_check",
    "test_conformance_operator",
]

PROFILE_VARIABLE = "POLYACCEL_CONFORMANCE_PROFILE"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("conformance")
    group.addoption("--conformance-profile", help="quick, default, certify or fuzz")
    group.addoption("--conformance-devices", type=int, help="ranks at most")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Operators and checks as parameters of the two tests."""
    for name, values in (("conformance_operator", PROBLEM_SETS), ("conformance_check", CHECKS)):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, list(values))


@pytest.fixture(scope="module")
def conformance_subject(request: pytest.FixtureRequest) -> Subject:
    """What is tested; may be overridden."""
    backend, table = getattr(request.module, "BACKEND", None), getattr(request.module, "TABLE", None)
    if (backend is None) == (table is None):
        raise UsageError(f"{request.module.__name__} must set either BACKEND or TABLE")
    if backend is not None:
        return Subject(kind="backend", name=backend)
    path, _, name = str(table).rpartition(":")
    return Subject(kind="table", name=name, path=str(Path(path).resolve()))


@pytest.fixture(scope="module")
def conformance_options(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Options:
    """How it is tested; may be overridden."""
    profile = request.config.getoption("--conformance-profile", default=None)
    devices = request.config.getoption("--conformance-devices", default=None)
    written = os.environ.get(PROFILE_VARIABLE) or getattr(request.module, "PROFILE", "quick")
    return Options(
        profile=str(profile or written),
        devices=int(devices or getattr(request.module, "DEVICES", 1)),
        folder=tmp_path_factory.mktemp("conformance"),
    )


@pytest.fixture(scope="module")
def conformance_run(conformance_subject: Subject, conformance_options: Options) -> RunResult:
    """The one run that all tests look at."""
    return run(conformance_subject, conformance_options)


def test_conformance_operator(conformance_operator: str, conformance_run: RunResult) -> None:
    """No case of the operator fails."""
    state = next((s for s in conformance_run.operators if s.operator == conformance_operator), None)
    if state is None or not state.cases:
        pytest.skip("not run" if state is None else state.reason)
    blocks = [failure_block(group) for group in conformance_run.failures if group.operator == conformance_operator]
    if blocks:
        pytest.fail("\n".join(blocks), pytrace=False)


def test_conformance_check(conformance_check: str, conformance_run: RunResult) -> None:
    """The check's control failed as it must, so that its silence means something."""
    state = next((s for s in conformance_run.checks if s.check == conformance_check), None)
    if state is None or state.verdict == "not exercised":
        pytest.skip("not asked" if state is None else state.reason)
    if state.verdict == "inconclusive":
        pytest.fail(state.reason, pytrace=False)
