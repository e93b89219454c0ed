"""Facts of a device, measured: what it can store, whether copies keep bits, views, streams, events, graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch

from polyaccel.backend import Backend, Device
from polyaccel_conformance.formats import bits_of
from polyaccel_conformance.preflight.finding import Finding, Mark
from polyaccel_conformance.simulated.factories import virtual_device

REQUIRED = (torch.float32, torch.int32)
"""What every level stores. One 16-bit type is needed too; float64, int64 and the rest never are."""
HALVES = (torch.bfloat16, torch.float16)
OTHERS = (torch.int64, torch.float64, torch.uint8, torch.bool)

Answer = tuple[bool, str]


def device_findings(backend: Backend, device: Device) -> Iterator[Finding]:
    """Every fact of one device; a probe that raises is a fact too."""
    section = f"device {device.index}"
    every = (*REQUIRED, *HALVES, *OTHERS)
    stored = {dtype: _tried(partial(_keeps, device, _pattern(dtype))) for dtype in every}
    for dtype in REQUIRED:
        yield _required(section, f"stores {_name(dtype)}", stored[dtype])
    found = [_name(dtype) for dtype in HALVES if stored[dtype][0]]
    yield _required(section, "stores a 16-bit type", (bool(found), ", ".join(found) or stored[HALVES[0]][1]))
    for dtype in OTHERS:
        yield _optional(section, f"stores {_name(dtype)}", stored[dtype])
    yield _required(section, "copies keep NaN payloads", _tried(lambda: _keeps(device, _payloads())))
    yield _required(section, "empty tensors", _tried(lambda: _keeps(device, torch.empty((0, 3)))))
    yield _required(section, "views with an offset", _tried(lambda: _view(device, (4, 3), (3, 1), 1)))
    yield _required(section, "as_strided", _tried(lambda: _view(device, (3, 4), (1, 3), 2)))
    yield _required(section, "casting copies", _tried(lambda: _casts(device)))
    yield _optional(section, "int64 indices", _tried(lambda: _indices(device)))
    yield _required(section, "events", _tried(lambda: _events(device)))
    yield _required(section, "memory", _tried(lambda: _memory(device)))
    yield _optional(section, "streams", _tried(lambda: _streams(device)))
    refusals = backend.graph_refusals()
    yield _optional(section, "graphs", (not refusals, "; ".join(refusals)))


def _required(section: str, name: str, answer: Answer) -> Finding:
    return Finding(section=section, name=name, mark=Mark.OK if answer[0] else Mark.FAIL, detail=answer[1])


def _optional(section: str, name: str, answer: Answer) -> Finding:
    return Finding(section=section, name=name, mark=Mark.OK if answer[0] else Mark.ABSENT, detail=answer[1])


def _tried(probe: Callable[[], Answer]) -> Answer:
    try:
        return probe()
    except Exception as error:
        return False, f"{type(error).__name__}: {first_line(error)}"


def first_line(error: BaseException) -> str:
    """The first line of a message, short enough for a table."""
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else "no message"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _pattern(dtype: torch.dtype) -> torch.Tensor:
    """``[4, 3]`` different values of a dtype, exact in every one."""
    values = torch.arange(12).reshape(4, 3)
    return values % 2 == 1 if dtype is torch.bool else values.to(dtype)


def _payloads() -> torch.Tensor:
    """float32 quiet NaNs of both signs whose payload bits differ."""
    bits = np.array([0x7FC00001, 0x7FD55555, 0xFFC12345, 0xFFFFFFFF], dtype=np.uint32)
    return torch.from_numpy(bits.view(np.float32))


def _keeps(device: Device, host: torch.Tensor) -> Answer:
    """Whether content that goes to the device comes back bit for bit."""
    placed = device.upload(host)
    device.synchronize()
    if placed.device.type != device.torch_device.type:
        return False, f"upload returned a tensor on {placed.device}, the device is {device.torch_device}"
    back = placed.to("cpu")
    if back.shape != host.shape or back.dtype != host.dtype:
        return False, f"{_name(host.dtype)}{list(host.shape)} came back as {_name(back.dtype)}{list(back.shape)}"
    wrong = int((bits_of(back) != bits_of(host)).sum())
    return wrong == 0, "" if wrong == 0 else f"{wrong} of {host.numel()} elements came back different"


def _view(device: Device, shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> Answer:
    host = torch.arange(32, dtype=torch.float32)
    placed = device.upload(host).as_strided(shape, strides, offset)
    back, wanted = placed.to("cpu"), host.as_strided(shape, strides, offset)
    same = back.shape == wanted.shape and bool(torch.equal(back, wanted))
    return same, "" if same else "the view holds other elements"


def _casts(device: Device) -> Answer:
    target = device.empty((4,), torch.float32)
    device.copy_(target, torch.tensor([1, 2, 3, 4], dtype=torch.int32))
    device.synchronize()
    same = target.to("cpu").tolist() == [1.0, 2.0, 3.0, 4.0]
    return same, "" if same else f"int32 1..4 became {target.to('cpu').tolist()}"


def _indices(device: Device) -> Answer:
    rows = device.upload(torch.arange(12, dtype=torch.float32).reshape(4, 3))
    index = device.upload(torch.tensor([3, 0], dtype=torch.int64))
    same = rows.index_select(0, index).to("cpu").tolist() == [[9.0, 10.0, 11.0], [0.0, 1.0, 2.0]]
    return same, "" if same else "index_select chose other rows"


def _events(device: Device) -> Answer:
    event = device.record()
    event.synchronize()
    done = event.query()
    return done, "" if done else "an event that was waited for is not complete"


def _memory(device: Device) -> Answer:
    info = device.memory()
    sane = 0 <= info.free <= info.total and info.total > 0
    return sane, f"{info.free / 2**30:.1f} of {info.total / 2**30:.1f} GiB free"


def _streams(device: Device) -> Answer:
    kind = device.torch_device.type
    if kind in ("cpu", "meta"):
        return False, "one queue; checks on side streams are not exercised"
    if virtual_device(device.torch_device) is not None:
        return True, ""
    module = torch.get_device_module(kind)
    has = hasattr(module, "Stream") and hasattr(module, "stream")
    return has, "" if has else f"torch.{kind} has no streams"
