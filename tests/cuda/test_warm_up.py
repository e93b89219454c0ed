"""What is begun beside the weights' copy is waited for where it is needed, and its error comes out there."""

from __future__ import annotations

import threading

import pytest
import torch

from polyaccel.backend import Slice, TorchDevice, WeightSpec
from polyaccel_cuda.backend import CudaBackend
from polyaccel_cuda.warm_up import WarmUp


def test_the_work_runs_once_on_a_thread_of_its_own_and_finish_waits_for_it() -> None:
    ran: list[str] = []
    gate = threading.Event()

    def work() -> None:
        gate.wait(10)
        ran.append(threading.current_thread().name)

    warm_up = WarmUp()
    warm_up.begin(work)
    warm_up.begin(work)
    assert ran == []
    gate.set()
    warm_up.finish()
    warm_up.finish()
    assert ran == ["polyaccel-warm-up"]


def test_an_error_of_the_work_is_raised_once_where_it_is_waited_for() -> None:
    def work() -> None:
        raise ImportError("no kernels")

    warm_up = WarmUp()
    warm_up.begin(work)
    with pytest.raises(ImportError, match="no kernels"):
        warm_up.finish()
    warm_up.finish()


def test_nothing_is_begun_once_operators_were_asked_for() -> None:
    ran: list[int] = []
    warm_up = WarmUp()
    warm_up.finish()
    warm_up.begin(lambda: ran.append(1))
    warm_up.finish()
    assert ran == []


def test_a_weight_on_the_cpu_begins_nothing() -> None:
    backend = CudaBackend()
    backend.allocate_weight(
        WeightSpec(site="s", slices=(Slice(name="y", n=8),), k=8, dtype=torch.float32), TorchDevice("cpu")
    )
    assert [thread.name for thread in threading.enumerate() if thread.name == "polyaccel-warm-up"] == []
    assert backend.operators()
    assert backend.kernels is None
    backend.close()
