"""The machine's driver: devices, the thread's current device and streams, launches, waiting, failures.

What a vendor's runtime library offers. Nothing here guards anything: a launch goes to the current stream of the
current device, and a kernel that meets memory of another device fails when it runs.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch.utils._python_dispatch import _disable_current_modes

from polyaccel.backend import DeviceLost, OperandInfo, OperatorError, OutOfMemory
from polyaccel_conformance.simulated.factories import DEVICE_TYPE, announce, claim_numbers
from polyaccel_conformance.simulated.stream import Mark, Stream, Task, Timeline


class IllegalAccess(RuntimeError):
    """A kernel touched memory of another device."""


@dataclass(frozen=True, slots=True)
class Failure:
    """What went wrong on a device, kept until somebody waits for it."""

    task: Task
    cause: Exception

    def error(self) -> OperatorError:
        operands = [OperandInfo.of(name, tensor) for name, tensor in self.task.operands]
        return OperatorError(self.task.kernel, f"failed on the device: {self.cause}", operands, self.task.rank)


@dataclass(slots=True, eq=False, weakref_slot=True)
class VirtualDevice:
    """One device: its streams, what it holds, what it did.

    ``index`` counts the machine's devices, ``number`` is torch's for it.
    ``allocated`` counts bytes held, ``ever`` those of freed memory too; ``trace`` is what a profiler would show, while
    one is attached: name and kind.
    """

    runtime: Runtime
    index: int
    number: int
    capacity: int
    streams: list[Stream] = field(default_factory=list)
    allocated: int = 0
    ever: int = 0
    trace: list[tuple[str, str]] | None = None
    failure: Failure | None = None
    surfaced: bool = False

    @property
    def torch_device(self) -> torch.device:
        return torch.device(DEVICE_TYPE, self.number)


class Memory:
    """Device memory that tensors refer to; counted until the last of them is gone."""

    __slots__ = ("__weakref__", "device", "nbytes")

    def __init__(self, device: VirtualDevice, nbytes: int) -> None:
        if device.allocated + nbytes > device.capacity:
            raise OutOfMemory(
                f"simulated:{device.index}: {nbytes} bytes asked for, {device.capacity - device.allocated} free"
            )
        self.device, self.nbytes = device, nbytes
        device.allocated += nbytes
        device.ever += nbytes
        weakref.finalize(self, _release, device, nbytes)


def _release(device: VirtualDevice, nbytes: int) -> None:
    device.allocated -= nbytes


class _Context(threading.local):
    """What belongs to a thread: its current device, and its current stream on each device."""

    device = 0

    def __init__(self) -> None:
        self.streams: dict[int, Stream] = {}


class Runtime:
    """One simulated machine, used by one backend instance.

    Args:
        devices: how many.
        capacity: bytes of memory each.
        host_tick: virtual time that passes on the host with every call; 0 is the most hostile.
    """

    def __init__(self, devices: int = 2, *, capacity: int = 1 << 34, host_tick: float = 0.0) -> None:
        first = claim_numbers(devices)
        self.devices = [VirtualDevice(self, index, first + index, capacity) for index in range(devices)]
        for device in self.devices:
            announce(device.number, device)
            device.streams.append(Stream(device, 0))
        self._host_tick = host_tick
        self._timeline = Timeline()
        self._context = _Context()
        self._kernel_device: VirtualDevice | None = None
        self._capture: tuple[Stream, list[Task]] | None = None
        self._armed: tuple[str, str] | None = None

    # -- current device and stream -----------------------------------------------------------------------------------

    @property
    def current_device(self) -> VirtualDevice:
        return self.devices[self._context.device]

    @contextmanager
    def use_device(self, device: VirtualDevice) -> Iterator[None]:
        before, self._context.device = self._context.device, device.index
        try:
            yield
        finally:
            self._context.device = before

    def set_device(self, index: int) -> None:
        """Without a way back."""
        self._context.device = self.devices[index].index

    def new_stream(self, device: VirtualDevice) -> Stream:
        stream = Stream(device, len(device.streams))
        device.streams.append(stream)
        return stream

    def current_stream(self, device: VirtualDevice) -> Stream:
        return self._context.streams.get(device.index, device.streams[0])

    @contextmanager
    def use_stream(self, stream: Stream) -> Iterator[None]:
        """Make it current on its device (which does not become current)."""
        streams, index = self._context.streams, stream.device.index
        before = self.current_stream(stream.device)
        streams[index] = stream
        try:
            yield
        finally:
            streams[index] = before

    # -- work ----------------------------------------------------------------------------------------------------------

    def submit(self, task: Task, stream: Stream | None = None) -> None:
        """Put work into a stream: by default the current one of the current device.

        Raises:
            DeviceLost: an earlier failure of the device has been reported.
            OperatorError: a graph is being captured on another stream.
        """
        where = stream if stream is not None else self.current_stream(self.current_device)
        self.refuse_if_lost(where.device)
        if self._armed is not None and task.kind == "kernel" and self._armed[0] in ("", task.kernel):
            task, self._armed = _failing(task, self._armed[1]), None
        if self._capture is not None:
            captured, tasks = self._capture
            if where is not captured:
                raise OperatorError(task.kernel, "is launched on another stream than the one being captured")
            tasks.append(task)
            return
        self._timeline.put(where, task)
        if self._host_tick:
            self._timeline.advance(self._timeline.now + self._host_tick, self._run)

    def submit_all(self, tasks: Sequence[Task], stream: Stream) -> None:
        for task in tasks:
            self.submit(task, stream)

    def delay(self, stream: Stream, duration: float) -> None:
        """Keep a stream busy."""
        self.submit(Task(kernel="delay", call=_nothing, kind="delay", duration=duration), stream)

    @contextmanager
    def capture(self, stream: Stream) -> Iterator[list[Task]]:
        """Collect what is submitted in the block; it does not run.

        Raises:
            OperatorError: a capture is in progress.
        """
        if self._capture is not None:
            raise OperatorError("capture", "a graph is being captured already")
        tasks: list[Task] = []
        self._capture = (stream, tasks)
        try:
            yield tasks
        finally:
            self._capture = None

    @property
    def capturing(self) -> bool:
        return self._capture is not None

    # -- waiting -------------------------------------------------------------------------------------------------------

    def mark(self, stream: Stream) -> Mark:
        return Mark(stream.device, max(stream.end, self._timeline.now))

    def stream_wait(self, stream: Stream, mark: Mark) -> None:
        """What is submitted from now on begins after the mark."""
        stream.end = max(stream.end, mark.time)

    def passed(self, mark: Mark) -> bool:
        """Whether the host may know that it has been reached. Asking takes a moment, so that a loop ends."""
        if mark.time > self._timeline.now and self._capture is None:
            self._timeline.advance(self._timeline.now + 1.0, self._run)
        return mark.time <= self._timeline.now

    def wait(self, mark: Mark) -> None:
        """Block the host. A failure of the device is raised here.

        Raises:
            OperatorError: the failure, once: kernel, rank and operands.
            DeviceLost: afterwards.
        """
        if self._kernel_device is not None:
            return
        if self._capture is not None:
            raise OperatorError("capture", "the device is waited for while a graph is being captured")
        self._timeline.advance(mark.time, self._run)
        self._surface(mark.device)

    def wait_stream(self, stream: Stream) -> None:
        self.wait(self.mark(stream))

    def wait_device(self, device: VirtualDevice) -> None:
        latest = max((stream.end for stream in device.streams), default=0.0)
        self.wait(Mark(device, max(latest, self._timeline.now)))

    # -- failures ------------------------------------------------------------------------------------------------------

    def arm_failure(self, kernel: str = "", reason: str = "illegal instruction") -> None:
        """The next kernel (of this name) fails when it runs, long after its launch has returned."""
        self._armed = (kernel, reason)

    @property
    def armed(self) -> bool:
        """Whether an armed failure has met no kernel yet."""
        return self._armed is not None

    def refuse_if_lost(self, device: VirtualDevice) -> None:
        if device.surfaced and device.failure is not None:
            raise DeviceLost(
                f"simulated:{device.index}: {device.failure.task.kernel} failed earlier: {device.failure.cause}"
            ) from device.failure.cause

    def _surface(self, device: VirtualDevice) -> None:
        self.refuse_if_lost(device)
        if device.failure is not None:
            device.surfaced = True
            raise device.failure.error() from device.failure.cause

    # -- inside of kernels ---------------------------------------------------------------------------------------------

    @property
    def kernel_device(self) -> VirtualDevice | None:
        """The device whose kernel is being run, None on the host."""
        return self._kernel_device

    def _run(self, stream: Stream, task: Task) -> None:
        device = stream.device
        if device.failure is not None:
            return
        if device.trace is not None:
            device.trace.append((task.kernel, task.kind))
        self._kernel_device = device
        try:
            # Device work is invisible to whoever watches the host's operators.
            modes = _disable_current_modes() if torch._C._len_torch_dispatch_stack() else nullcontext()
            with modes, torch.no_grad():
                task.call()
        except Exception as error:
            device.failure = Failure(task, error)
        finally:
            self._kernel_device = None


def _failing(task: Task, reason: str) -> Task:
    def fail() -> None:
        raise RuntimeError(reason)

    return replace(task, call=fail)


def _nothing() -> None:
    return None


def named(tensors: Iterable[tuple[str, torch.Tensor | None]]) -> tuple[tuple[str, torch.Tensor], ...]:
    """The operands that there are, for an error to describe."""
    return tuple((name, tensor) for name, tensor in tensors if tensor is not None)
