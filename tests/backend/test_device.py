"""A torch device, driven synchronously, and events that are always done."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyaccel.backend import DoneEvent, ReadyHostCopy, TorchDevice
from polyaccel.backend.device import ALIGNMENT

CPU = TorchDevice("cpu")


@given(
    st.lists(st.integers(0, 5), max_size=4), st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool])
)
def test_zeros_are_aligned_zeros_of_their_own(shape: list[int], dtype: torch.dtype) -> None:
    made, other = CPU.zeros(shape, dtype), CPU.zeros(shape, dtype)
    assert (tuple(made.shape), made.dtype, made.is_contiguous()) == (tuple(shape), dtype, True)
    assert not made.bool().any()
    assert made.numel() == 0 or made.data_ptr() % ALIGNMENT == 0
    made.fill_(1)
    assert not other.bool().any()


def test_an_upload_is_a_copy_and_the_source_may_be_reused() -> None:
    array = np.arange(4, dtype=np.int32)
    tensor = torch.arange(4.0)
    uploaded = CPU.upload(array), CPU.upload(tensor)
    array[:] = -1
    tensor.fill_(-1)
    assert [u.tolist() for u in uploaded] == [[0, 1, 2, 3], [0.0, 1.0, 2.0, 3.0]]
    assert uploaded[0].dtype == torch.int32


def test_a_download_is_the_callers_own_array() -> None:
    tensor = torch.arange(6.0).view(2, 3).t()
    array = CPU.download(tensor).wait()
    tensor.fill_(-1.0)
    assert array.tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]


def test_a_copy_casts_and_takes_any_strides() -> None:
    destination = torch.zeros(3, 2, dtype=torch.bfloat16)
    CPU.copy_(destination, torch.arange(6.0).view(2, 3).t())
    assert destination.tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]


def test_a_synchronous_device_is_always_done() -> None:
    event = CPU.record()
    assert isinstance(event, DoneEvent)
    assert event.query()
    event.synchronize()
    CPU.synchronize()
    assert ReadyHostCopy(np.ones(2)).wait().tolist() == [1.0, 1.0]
    with CPU.scope():
        pass


def test_memory_is_that_of_the_machine() -> None:
    memory = CPU.memory()
    assert 0 < memory.free <= memory.total


@pytest.mark.parametrize(("device", "name"), [("cpu", None), ("meta", None), ("cpu", "example:0")])
def test_a_device_has_the_name_it_was_given(device: str, name: str | None) -> None:
    made = TorchDevice(device, index=3, name=name)
    assert (made.name, made.index, made.torch_device) == (name or device, 3, torch.device(device))
    assert made.empty((2,), torch.float32).device.type == device
    assert made.zeros((2,), torch.float32).device.type == device
