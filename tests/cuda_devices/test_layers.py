"""Layers of a 7B and of a rank's share of a 70B on a GPU, and of the 7B on two: every station within its bound."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cuda_devices.pool import GPUS, OK, run_cases, several

pytestmark = pytest.mark.skipif(not GPUS, reason="needs a CUDA device")
SECONDS = 400.0


@pytest.fixture(scope="module", autouse=True)
def larger_families() -> Iterator[None]:
    from tests.support.large_layers import enlarged, forget

    with enlarged():
        yield
    forget()


@pytest.mark.parametrize("adapters", ["none", "all"])
@pytest.mark.parametrize("phase", ["prefill", "decode", "mixed"])
@pytest.mark.parametrize("shape", ["7B", "70B/4"])
def test_first_middle_and_last_layer_are_within_the_bound(shape: str, phase: str, adapters: str) -> None:
    from polyaccel_conformance.bench import Bench
    from polyaccel_cuda.backend import CudaBackend
    from tests.support.large_layers import prove

    backend = CudaBackend()
    try:
        found = prove(Bench(backend, policy="strict"), shape, phase, adapters)
    finally:
        backend.close()
    print(f"{shape}, {phase}, adapters {adapters}: " + ", ".join(f"{k} {v:.2f}" for k, v in found.worst.items()))
    assert found.failure is None, found.failure


@several
def test_two_ranks_hand_on_what_one_would() -> None:
    names = ["layers_in_prefill", "layers_in_decode"]
    answers = run_cases(2, names, SECONDS)
    assert {name: answers[name] for name in names} == {name: [OK, OK] for name in names}, answers
