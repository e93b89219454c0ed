"""Virtual time: what has happened, and what has not, when nobody waited."""

from __future__ import annotations

import pytest
import torch

from polyaccel.backend import DeviceLost, OperatorError, OutOfMemory
from polyaccel_conformance.simulated import Runtime, SimulatedBackend
from polyaccel_conformance.simulated.launch import launch
from polyaccel_conformance.simulated.stream import Task
from polyaccel_conformance.simulated.tensor import VirtualTensor


def _peek(tensor: torch.Tensor) -> list[float]:
    assert isinstance(tensor, VirtualTensor)
    return tensor.host.tolist()


def test_nothing_has_happened_before_somebody_waits() -> None:
    device = SimulatedBackend().devices()[0]
    x = device.zeros((2,), torch.float32)
    x.add_(1)
    assert _peek(x) != [1.0, 1.0]
    device.record().synchronize()
    assert _peek(x) == [1.0, 1.0]


def test_waiting_for_one_stream_does_not_wait_for_another() -> None:
    backend = SimulatedBackend()
    device, runtime = backend.devices()[0], backend.runtime
    x, y = device.zeros((1,), torch.float32), device.zeros((1,), torch.float32)
    device.synchronize()
    side = runtime.new_stream(runtime.devices[0])
    with runtime.use_stream(side):
        runtime.delay(side, 50.0)
        x.add_(1)
    y.add_(1)
    assert y.cpu().tolist() == [1.0]
    assert _peek(x) == [0.0]
    runtime.wait_stream(side)
    assert _peek(x) == [1.0]


def test_an_event_orders_two_streams() -> None:
    backend = SimulatedBackend()
    device, runtime = backend.devices()[0], backend.runtime
    default, side = runtime.devices[0].streams[0], runtime.new_stream(runtime.devices[0])
    x = device.zeros((1,), torch.float32)
    device.synchronize()
    for waits, expected in ((False, 0.0), (True, 1.0)):
        x.zero_()
        device.synchronize()
        with runtime.use_stream(side):
            runtime.delay(side, 50.0)
            x.add_(1)
        if waits:
            runtime.stream_wait(default, runtime.mark(side))
        assert x.cpu().tolist() == [expected]
        device.synchronize()


def test_asking_an_event_again_and_again_lets_time_pass() -> None:
    backend = SimulatedBackend()
    device = backend.devices()[0]
    device.zeros((1,), torch.float32).add_(1)
    event = device.record()
    assert [event.query() for _ in range(4)] == [False, True, True, True]


def test_a_host_that_is_slow_sees_work_done_without_waiting() -> None:
    backend = SimulatedBackend(Runtime(1, host_tick=3.0))
    x = backend.devices()[0].zeros((1,), torch.float32)
    x.add_(1)
    assert _peek(x) == [1.0]


def test_a_kernel_on_foreign_memory_fails_late_once_by_name_and_then_the_device_is_lost() -> None:
    backend = SimulatedBackend()
    first, second = backend.devices()
    x = second.zeros((3,), torch.float32)
    second.synchronize()
    task = Task(kernel="raw", call=lambda: x.add_(1), rank=0)
    backend.runtime.submit(task)
    first.zeros((1,), torch.float32)
    with pytest.raises(OperatorError, match=r"(?s)'raw' on rank 0.*illegal memory access: memory of device 1"):
        first.synchronize()
    for attempt in (first.synchronize, lambda: first.zeros((1,), torch.float32), lambda: first.record().synchronize()):
        with pytest.raises(DeviceLost, match="raw failed earlier"):
            attempt()
    second.synchronize()
    assert x.cpu().tolist() == [0.0, 0.0, 0.0]


def test_a_launch_allocates_and_runs_on_the_device_of_its_operands() -> None:
    backend = SimulatedBackend()
    first, second = backend.devices()
    x = second.upload(torch.tensor([1.0, 2.0]))
    (y,) = launch(backend.launcher, "double", {"x": x}, lambda: x * 2, [((2,), torch.float32)])
    assert y.device == second.torch_device
    assert y.cpu().tolist() == [2.0, 4.0]
    assert backend.runtime.current_device.index == 0
    assert first.memory().free == first.memory().total


def test_operands_of_two_devices_are_refused_by_name() -> None:
    backend = SimulatedBackend()
    x, residual = (device.zeros((2, 4), torch.float32) for device in backend.devices())
    weight = backend.devices()[0].zeros((4,), torch.float32)
    rms_norm = backend.table()["rms_norm"][0].fn
    with pytest.raises(OperatorError, match=r"residual is on privateuseone:\d+ but x is on"):
        rms_norm(x, weight, 1e-5, residual)


def test_memory_is_counted_until_the_last_view_is_gone() -> None:
    device = SimulatedBackend(Runtime(1, capacity=1000)).devices()[0]
    x = device.empty((100,), torch.float32)
    view = x[10:20]
    del x
    assert device.memory().free == 600
    with pytest.raises(OutOfMemory, match="800 bytes asked for, 600 free"):
        device.empty((200,), torch.float32)
    del view
    assert device.memory().free == 1000


def test_torchs_own_factories_and_operators_work_on_virtual_devices() -> None:
    device = SimulatedBackend().devices()[1].torch_device
    x = torch.arange(6, dtype=torch.float32, device=device).view(2, 3)
    found = torch.where(x > 2, x.cumsum(-1), torch.zeros(2, 3, device=device)).T.contiguous()
    assert found.device == device
    assert found.to("cpu").tolist() == [[0.0, 3.0], [0.0, 7.0], [0.0, 12.0]]
    assert torch.equal(torch.ones(3).to(device), torch.ones(3, device=device))
    x[:, 1:] = 7
    x[0, 0] = -1.0
    x[torch.tensor([1]).to(device), 2] = 5.0
    assert x.to("cpu").tolist() == [[-1.0, 7.0, 7.0], [3.0, 7.0, 5.0]]


def test_what_torch_would_do_behind_a_virtual_devices_back_is_refused() -> None:
    device = SimulatedBackend().devices()[0].torch_device
    with pytest.raises(RuntimeError, match=r"make it on the host and move it there"):
        torch.tensor([1.0, 2.0], device=device)
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(2, device=device) + torch.ones(2)


def test_a_host_source_may_change_as_soon_as_an_upload_returns() -> None:
    device = SimulatedBackend().devices()[0]
    source = torch.ones(3)
    x = device.upload(source)
    y = device.zeros((3,), torch.float32)
    device.copy_(y, source)
    source.fill_(7)
    device.synchronize()
    assert x.cpu().tolist() == y.cpu().tolist() == [1.0, 1.0, 1.0]
