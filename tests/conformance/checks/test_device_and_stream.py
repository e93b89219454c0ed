"""Guards, streams and memory: healthy code passes, each planted bug is caught by the check of its name."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from polyaccel.backend import Backend, load
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Case
from polyaccel_conformance.check import Check, Failure
from polyaccel_conformance.checks.device import DEVICE_CHECKS
from polyaccel_conformance.checks.stream import STREAM_CHECKS
from polyaccel_conformance.harness.controls import linear_problem
from polyaccel_conformance.harness.streams import stale_delay
from polyaccel_conformance.problem import Problem
from polyaccel_conformance.problems.registry import PROBLEM_SETS
from polyaccel_conformance.simulated import Runtime, SimulatedBackend
from polyaccel_conformance.trial import Trial
from tests.conformance.simulated import broken

CHECKS = {**DEVICE_CHECKS, **STREAM_CHECKS}
SEED = 5


def _ask(check: Check, backend: Backend, problem: Problem) -> Failure | None:
    trial = Trial(Bench(backend), problem)
    try:
        return check.run(trial)
    finally:
        trial.close()


def _embedding() -> Problem:
    """An operator without tensor operands: everything late is metadata."""
    cases = PROBLEM_SETS["embedding"]
    axes = cases.mend({path: values[0] for path, values in cases.axes().items()} | {"dims.tokens": 7, "dims.n": 33})
    assert axes is not None
    return cases.problem(Case.of("embedding", axes, SEED))


@pytest.mark.parametrize("name", CHECKS)
def test_healthy_code_passes_and_the_control_fails(name: str) -> None:
    check = CHECKS[name]
    assert check.unavailable(Bench(broken.healthy())) == ""
    assert check.control(Bench(broken.healthy())) == "failed as it must"
    for problem in (linear_problem(), _embedding()):
        assert _ask(check, broken.healthy(), problem) is None


@pytest.mark.parametrize(
    ("name", "mutant", "cause"),
    [
        ("device.wrong_current", broken.no_guard, "fails on a device that is not current"),
        ("device.wrong_current", broken.not_restored, "current device changed"),
        ("device.wrong_current", broken.scratch_on_the_first_device, "foreign allocation"),
        ("memory.steady", broken.leaks, "memory grows with every call"),
        ("stream.side", broken.default_stream, "stale data on a side stream"),
    ],
)
def test_each_planted_bug_is_caught(name: str, mutant: Callable[[], Backend], cause: str) -> None:
    found = _ask(CHECKS[name], mutant(), linear_problem())
    assert found is not None
    assert found.check == name
    assert found.cause == cause


def test_operands_of_two_devices_that_are_let_in_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    check, careless = CHECKS["device.wrong_current"], broken.takes_any_device
    # The plan refuses them before an implementation that would not.
    assert _ask(check, careless(), linear_problem()) is None
    monkeypatch.setattr("polyaccel.backend.plan.check_devices", lambda *operands: None)
    found = _ask(check, careless(), linear_problem())
    assert found is not None
    assert found.cause == "mixed devices accepted"


def test_metadata_on_another_stream_is_caught() -> None:
    found = _ask(CHECKS["stream.side"], broken.step_on_another_stream(), _embedding())
    assert found is not None
    assert found.check == "stream.side"


@pytest.mark.parametrize("name", CHECKS)
def test_a_device_that_has_nothing_to_ask_is_not_exercised_with_the_reason(name: str) -> None:
    reason = CHECKS[name].unavailable(Bench(load("cpu")))
    assert "cpu" in reason
    assert "offers the harness no" in reason


def test_one_device_is_too_few_for_the_wrong_one_to_be_current() -> None:
    reason = CHECKS["device.wrong_current"].unavailable(Bench(SimulatedBackend(Runtime(1))))
    assert "one device" in reason


@pytest.mark.parametrize(("host_tick", "expected"), [(0.0, 1.0), (20.0, 64.0)])
def test_the_delay_is_doubled_until_a_read_without_synchronisation_is_stale(host_tick: float, expected: float) -> None:
    assert stale_delay(Bench(SimulatedBackend(Runtime(2, host_tick=host_tick)))) == expected
