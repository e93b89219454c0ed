"""Which aten operators the composites execute, found by running them, and which of those a device lacks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves, tree_map

from polyaccel.backend import Backend, Device, PolyaccelError, TableBackend, TorchDevice
from polyaccel.backend.backend import Implementations
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Case, Choice
from polyaccel_conformance.harness.dispatch import PlainDispatchMode
from polyaccel_conformance.oracle.bounded import Expected
from polyaccel_conformance.preflight.facts import first_line
from polyaccel_conformance.preflight.finding import STORAGE, OperatorNeeds
from polyaccel_conformance.problem import Exactly, Prepared, Problem, ProblemSet
from polyaccel_conformance.trial import Trial

Execute = Callable[["Sample", Device], None]
LARGEST = 1 << 16
"""Elements of an operand that are kept: the inputs are tiny, and one that is not says nothing more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One call as it was made on the host, operands copied before it: enough to make it again elsewhere."""

    operation: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def name(self) -> str:
        return str(self.operation).removesuffix(".default")


@dataclass(slots=True)
class Recording:
    """Samples by contract operator, one for each aten operator and combination of dtypes."""

    samples: dict[str, dict[str, Sample]] = field(default_factory=dict)
    _current: list[str] = field(default_factory=list)
    _placed: dict[int, torch.Tensor] = field(default_factory=dict)

    @contextmanager
    def of(self, operator: str) -> Iterator[None]:
        """What runs inside belongs to ``operator``; inner blocks take precedence."""
        self._current.append(operator)
        try:
            yield
        finally:
            self._current.pop()

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        """Remember that this memory stands for the device's. Kept alive, so that its address stays its own."""
        self._placed[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def forget(self) -> None:
        self._placed.clear()

    def runs_on_device(self, args: object) -> bool:
        """Inside an operator everything does; elsewhere what touches memory of the device."""
        if not self._current:
            return False
        return self._current[-1] != STORAGE or any(
            t.untyped_storage().data_ptr() in self._placed for t in _tensors(args)
        )

    def note(self, operation: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        known = self.samples.setdefault(self._current[-1], {})
        key = f"{operation}({','.join(_dtypes((args, dict(kwargs))))})"
        if key not in known:
            known[key] = Sample(operation=operation, args=_copied(args), kwargs=_copied(dict(kwargs)))


class _Mode(PlainDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, recording: Recording) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recording = recording

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self._recording.runs_on_device((args, kwargs)):
            return func(*args, **kwargs)
        self._recording.note(func, args, kwargs)
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            self._recording.place(tensor)
        return result


class _Placing(TorchDevice):
    """The CPU, remembering which memory stands for a device's."""

    def __init__(self, recording: Recording) -> None:
        super().__init__("cpu")
        self._recording = recording

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return self._recording.place(super().empty(shape, dtype))

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return self._recording.place(super().zeros(shape, dtype))

    def upload(self, source: np.ndarray | torch.Tensor) -> torch.Tensor:
        return self._recording.place(super().upload(source))


class _Composites(TableBackend):
    """Every composite on the CPU, each call attributed to its operator."""

    def __init__(self, recording: Recording) -> None:
        super().__init__(_Placing(recording), {}, name="composites")
        self._recording = recording

    def operators(self) -> Mapping[str, Implementations]:
        return {name: self._noted(name, fn) for name, fn in super().operators().items() if callable(fn)}

    def composites(self) -> Mapping[str, Callable[..., object]]:
        return {name: self._noted(name, fn) for name, fn in super().composites().items()}

    def _noted(self, name: str, fn: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            with self._recording.of(name):
                return fn(*args, **kwargs)

        return call


class _Watched(Problem):
    """A problem whose weights, caches and steps are placed under the name of storage."""

    def __init__(self, problem: Problem, recording: Recording) -> None:
        self.case, self.source, self.exact = problem.case, problem.source, problem.exact
        self.operands = problem.operands
        self._problem, self._recording = problem, recording

    def prepare(self, bench: Bench) -> Prepared:
        with self._recording.of(STORAGE):
            return self._problem.prepare(bench)

    def expected(self) -> Mapping[str, Expected | Exactly]:
        return self._problem.expected()


def record(problem_set: ProblemSet, recording: Recording, most: int) -> str:
    """Run up to ``most`` cases of an operator's composite; returns why nothing is known, empty if a case ran."""
    backend = _Composites(recording)
    bench = Bench(backend)
    reason = "it has no cases on one device"
    ran = False
    recording.forget()
    for case in few_cases(problem_set, most):
        if case.ranks != 1:
            continue
        try:
            problem = problem_set.problem(case)
            trial = Trial(bench, _Watched(problem, recording))
            with _Mode(recording):
                observation = trial.observe()
        except Exception as error:
            reason = f"{type(error).__name__}: {first_line(error)}"
            continue
        if observation.error is not None:
            reason = f"{type(observation.error).__name__}: {first_line(observation.error)}"
            continue
        ran = True
    return "" if ran else reason


def few_cases(problem_set: ProblemSet, most: int) -> Iterator[Case]:
    """The plainest case of each dtype, then cases that differ from the plainest in one axis."""
    axes = problem_set.axes()
    plain: dict[str, Choice] = {path: values[0] for path, values in axes.items() if values}
    changes: list[dict[str, Choice]] = [{}]
    longest = max((len(values) for values in axes.values()), default=0)
    # Round by round over the axes, so that a small limit still touches every one of them.
    for i in range(1, longest):
        changes += [{path: values[i]} for path, values in axes.items() if i < len(values) and not _large(values[i])]
    seen: set[str] = set()
    for change in changes:
        if len(seen) >= most:
            return
        mended = problem_set.mend({**plain, **change})
        if mended is None:
            continue
        case = Case.of(problem_set.operator, mended, seed=len(seen))
        key = case.with_seed(0).key
        if key not in seen:
            seen.add(key)
            yield case


def _large(value: Choice) -> bool:
    return isinstance(value, int) and value > 256


@dataclass(slots=True)
class Attempts:
    """Recorded calls made on a device, each kind once, whichever operators need it.

    Attributes:
        deadline: of ``time.monotonic``, after which nothing more is tried.
    """

    device: Device
    execute: Execute
    deadline: float
    _found: dict[str, str] = field(default_factory=dict)

    def fails(self, key: str, sample: Sample) -> str | None:
        """Why the device cannot do it, empty if it can; None if there was no time to try."""
        if key not in self._found:
            if time.monotonic() >= self.deadline:
                return None
            try:
                self.execute(sample, self.device)
                self._found[key] = ""
            except Exception as error:
                self._found[key] = f"{type(error).__name__}: {first_line(error)}"
        return self._found[key]


def needs(operator: str, recording: Recording, backend: Backend, attempts: Attempts) -> OperatorNeeds:
    """Try everything that an operator's composite executed on the device."""
    samples = recording.samples.get(operator, {})
    missing: dict[str, str] = {}
    untried = 0
    for key, sample in samples.items():
        reason = attempts.fails(key, sample)
        if reason is None:
            untried += 1
        elif reason:
            missing.setdefault(sample.name, reason)
    return OperatorNeeds(
        operator=operator,
        native=operator in _native(backend),
        needs=tuple(sorted({sample.name for sample in samples.values()})),
        missing=missing,
        unknown=f"there was no time for {untried} of {len(samples)} aten calls" if untried else "",
    )


def _native(backend: Backend) -> frozenset[str]:
    try:
        return frozenset(backend.table())
    except (PolyaccelError, KeyError):
        return frozenset()


def execute_on(sample: Sample, device: Device) -> None:
    """Make the recorded call with its operands on ``device``; raises what the call raises."""
    target = device.torch_device

    def move(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return _placed(value, device)
        if isinstance(value, torch.device):
            return target
        return value

    with device.scope():
        sample.operation(*tree_map(move, sample.args), **tree_map(move, dict(sample.kwargs)))
    device.synchronize()


def _placed(value: torch.Tensor, device: Device) -> torch.Tensor:
    if value.is_contiguous():
        return device.upload(value)
    flat = value.as_strided((value.untyped_storage().nbytes() // value.element_size(),), (1,), 0)
    return device.upload(flat).as_strided(value.shape, value.stride(), value.storage_offset())


def _copied(value: Any) -> Any:
    """The same arguments with tensors of their own, strides kept (a call may change its operands)."""

    def copy(item: Any) -> Any:
        if not isinstance(item, torch.Tensor):
            return item
        if item.numel() > LARGEST or item.is_contiguous() or item.numel() == 0:
            return item.detach().clone(memory_format=torch.contiguous_format)
        reach = sum((n - 1) * s for n, s in zip(item.shape, item.stride(), strict=True)) + 1
        flat = item.detach().as_strided((reach,), (1,), item.storage_offset()).clone()
        return flat.as_strided(item.shape, item.stride(), 0)

    # Copying is not part of what is recorded.
    with torch._C._DisableTorchDispatch():
        return tree_map(copy, value)


def _tensors(value: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _dtypes(value: object) -> list[str]:
    return [str(tensor.dtype).removeprefix("torch.") for tensor in _tensors(value)]
