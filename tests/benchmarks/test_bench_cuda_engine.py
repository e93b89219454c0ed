"""What the benchmark of the CUDA engine makes of timings and of a profiler's records; no GPU is needed for that."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.project.source import ROOT

NEW = 16


@pytest.fixture(scope="module")
def bench() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        return importlib.import_module("bench_cuda_engine")


class Engine:
    """Its rows decode for as long as they are told to."""

    def __init__(self, *seconds: float) -> None:
        self._seconds = seconds

    def generate(self, prompts: list[list[int]], params: object, *, adapter: list[str | None]) -> list[Any]:
        timings = [SimpleNamespace(decode=took) for took in self._seconds]
        return [SimpleNamespace(timing=timing, token_ids=range(NEW)) for timing in timings]


def test_speed_is_that_of_the_steps_after_the_first_token(bench: Any) -> None:
    found = bench.decode(Engine(1.5, 1.5), [[1], [2]], {"none": [None, None]}, NEW, 2)
    assert found["none"] == (2 * (NEW - 1) / 1.5, [list(range(NEW))] * 2)


def test_rows_that_did_not_begin_in_one_step_are_no_measurement(bench: Any) -> None:
    with pytest.raises(SystemExit, match="max_batched_tokens"):
        bench.decode(Engine(1.5, 1.4), [[1], [2]], {"none": [None, None]}, NEW, 1)


@given(steps=st.integers(2, 20), busy=st.floats(1.0, 9.0), extra=st.booleans(), prefill=st.floats(10.0, 1000.0))
def test_the_share_of_the_device_is_that_of_the_steps_between_the_first_and_the_last_token(
    bench: Any, steps: int, busy: float, extra: bool, prefill: float
) -> None:
    records = [(0.0, prefill - 1.0, "gemm"), (prefill - 1.0, 1.0, "sample_kernel")]
    for step in range(steps - 1 + extra):
        begin = prefill + 10 * step
        # Kernels that overlap count once; the sampling ends a step.
        records += [(begin + 10 - busy, busy - 1, "gemm"), (begin + 10 - busy, (busy - 1) / 2, "other")]
        records += [(begin + 9, 1.0, "sample_kernel")]
    share, took = bench.busy_of(records, steps)
    assert share == pytest.approx(busy / 10)
    assert took == pytest.approx(10)


def test_steps_that_the_profiler_did_not_see_are_no_measurement(bench: Any) -> None:
    with pytest.raises(SystemExit, match="1 of 3 steps"):
        bench.busy_of([(0.0, 1.0, "sample_kernel")], 3)
