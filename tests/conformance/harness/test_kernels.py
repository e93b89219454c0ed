"""Whether a device's kernels can be seen is found out by a trace, for the vendor's library may be missing."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from polyaccel_conformance.checks.evidence import EVIDENCE_CHECKS
from polyaccel_conformance.harness import kernels
from polyaccel_conformance.harness.kernels import has_profiler, launches_unseen, profiler_refusal

# Any device of a vendor: other tests may have renamed privateuseone.
DEVICE = torch.device("xpu:0")
MISSING = "libmspti.so: cannot open shared object file: No such file or directory"


class Profiler:
    """torch.profiler, as far as it is used; ``fails`` is the step of a trace that raises."""

    ProfilerActivity = SimpleNamespace(PrivateUse1="privateuse1")

    def __init__(self, fails: str, supported: bool = True) -> None:
        self.fails, self.supported, self.traces = fails, supported, 0

    def supported_activities(self) -> set[str]:
        return {"privateuse1"} if self.supported else set()

    def profile(self, activities: list[str]) -> Profiler:
        self._step("profile")
        return self

    def __enter__(self) -> None:
        self.traces += 1
        self._step("begin")

    def __exit__(self, *error: object) -> None:
        self._step("end")

    def _step(self, name: str) -> None:
        if name == self.fails:
            raise RuntimeError(f"{MISSING}\nException raised from load")


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    kernels._refusal.cache_clear()
    yield
    kernels._refusal.cache_clear()


@pytest.mark.parametrize("fails", ["profile", "begin", "end"])
def test_a_profiler_without_the_vendors_library_is_no_profiler_and_says_which_is_missing(fails: str) -> None:
    with mock.patch.object(kernels, "_profiler", Profiler(fails)):
        assert not has_profiler(DEVICE)
        # The check that asks the dispatcher must not leave to this one what it cannot see.
        assert not launches_unseen(DEVICE)
        assert profiler_refusal(DEVICE).endswith(MISSING)


def test_the_check_of_kernels_is_not_exercised_rather_than_broken_without_a_profiler() -> None:
    check = EVIDENCE_CHECKS["evidence.kernels"]
    # Nothing of the bench and the trial but their device may be touched.
    bench = SimpleNamespace(torch_device=DEVICE)
    with mock.patch.object(kernels, "_profiler", Profiler("end")):
        assert check.run(SimpleNamespace(bench=bench)) is None  # type: ignore[arg-type]
        assert check.control(bench).startswith("impossible here")  # type: ignore[arg-type]


def test_a_working_profiler_is_tried_once_a_process() -> None:
    profiler = Profiler("")
    with mock.patch.object(kernels, "_profiler", profiler):
        assert all(has_profiler(DEVICE) for _ in range(5))
    assert profiler.traces == 1


def test_an_activity_that_torch_does_not_support_is_not_tried() -> None:
    profiler = Profiler("", supported=False)
    with mock.patch.object(kernels, "_profiler", profiler):
        assert profiler_refusal(DEVICE)
    assert profiler.traces == 0


def test_other_errors_of_a_profiler_are_no_missing_library() -> None:
    class Broken(Profiler):
        def _step(self, name: str) -> None:
            raise TypeError("a wrong argument")

    with mock.patch.object(kernels, "_profiler", Broken("")), pytest.raises(TypeError):
        has_profiler(DEVICE)
