"""Failures that the device reports late: healthy code passes, each planted bug is caught by the check of its name."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from polyaccel.backend import load
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.checks.errors import ERROR_CHECKS
from polyaccel_conformance.harness.controls import linear_problem
from polyaccel_conformance.harness.isolation import PRELOAD
from polyaccel_conformance.subject import Subject
from polyaccel_conformance.trial import Trial
from polyaccel_conformance.workers.process import ForkServer
from tests.conformance.simulated import broken


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    found = ForkServer(PRELOAD)
    yield found
    found.close()


def _bench(factory: str, server: ForkServer) -> Bench:
    subject = Subject(kind="table", path=broken.FILE, name=factory)
    bench = Bench(subject.open(), subject=subject)
    bench.memo["starter"] = server
    return bench


@pytest.mark.parametrize("name", ERROR_CHECKS)
def test_healthy_code_passes_and_the_control_fails(name: str, server: ForkServer) -> None:
    bench, check = _bench("healthy", server), ERROR_CHECKS[name]
    assert check.unavailable(bench) == ""
    assert check.run(Trial(bench, linear_problem())) is None
    assert check.control(bench) == "failed as it must"
    bench.synchronize()


@pytest.mark.parametrize(
    ("name", "mutant", "cause"),
    [
        ("errors.swallowed", "swallows", "failure swallowed"),
        ("errors.async_operator", "swallows", "no OperatorError for a late failure"),
        ("errors.async_operator", "names_no_operands", "operand not described"),
        ("errors.async_operator", "goes_on_after_a_failure", "later calls do not raise DeviceLost"),
    ],
)
def test_each_planted_bug_is_caught(name: str, mutant: str, cause: str, server: ForkServer) -> None:
    found = ERROR_CHECKS[name].run(Trial(_bench(mutant, server), linear_problem()))
    assert found is not None
    assert (found.check, found.cause) == (name, cause)


@pytest.mark.parametrize("name", ERROR_CHECKS)
def test_a_device_that_cannot_be_made_to_fail_is_not_exercised_with_the_reason(name: str) -> None:
    subject = Subject(name="cpu")
    assert "no failures" in ERROR_CHECKS[name].unavailable(Bench(load("cpu"), subject=subject))
    assert "another process" in ERROR_CHECKS[name].unavailable(Bench(broken.healthy()))
