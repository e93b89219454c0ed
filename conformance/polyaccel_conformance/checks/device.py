"""Whether every launch enters the device of its operands, and leaves the caller's current device alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from polyaccel.backend import OPERATORS, STATIONS, Device, OperatorError, PolyaccelError, Step, Weight
from polyaccel.backend.kv_cache import KVCache
from polyaccel.backend.sampling import SamplingState
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Case
from polyaccel_conformance.check import Check, Control, Failure
from polyaccel_conformance.formats import bits_of
from polyaccel_conformance.harness.controls import linear_problem, wrong_bench
from polyaccel_conformance.harness.devices import instruments
from polyaccel_conformance.problem import Problem
from polyaccel_conformance.trial import Output, Setting, Trial

Call = Callable[[Mapping[str, object]], object]

_PLACED = (Weight, Step, KVCache, SamplingState)
"""Arguments beside tensors that live on a device."""


class WrongCurrent(Check):
    """Operators and weights work with another device current, in both directions and after an exception.

    Everything is made, written, called and read while the other device is current: same bits, no byte there, the
    current device as before. Operands of two devices are refused, naming the argument.
    """

    name = "device.wrong_current"

    def unavailable(self, bench: Bench) -> str:
        tools = instruments(bench)
        return tools.lacks("devices") or tools.lacks("memory")

    def applies(self, case: Case, problem: Problem) -> bool:
        return case.device == "other"

    def run(self, trial: Trial) -> Failure | None:
        bench = trial.bench
        reference = trial.observe()
        if reference.error is not None:
            return None
        other = _bench_on(bench, instruments(bench).other)
        for own, current in ((bench, other), (other, bench)):
            found = self._direction(Trial(own, trial.problem), current.device, reference.outputs)
            if found is not None:
                return found
        return self._mixed(trial, other)

    def _direction(self, trial: Trial, current: Device, wanted: Mapping[str, Output]) -> Failure | None:
        """Operands on the trial's device, with ``current`` current."""
        tools, own = instruments(trial.bench), trial.bench.device
        where = f"operands on {own.name} while {current.name} is current"
        with tools.use(current):
            before, foreign = tools.current(), tools.ever_allocated(current)
            try:
                outputs = _outputs(trial)
            except PolyaccelError as error:
                return self._fail("fails on a device that is not current", f"{where}: {error}")
            after, now = tools.current(), tools.ever_allocated(current)
            failure = self._unequal(outputs, wanted, where)
            if failure is None and now != foreign:
                failure = self._fail("foreign allocation", f"{where}: {now - foreign} bytes allocated there")
            if failure is None and after != before:
                failure = self._fail("current device changed", f"{where}: left with device {after} current")
            return failure if failure is not None else self._after_exception(trial, current, wanted, where)

    def _after_exception(
        self, trial: Trial, current: Device, wanted: Mapping[str, Output], where: str
    ) -> Failure | None:
        """A call that finds no memory raises from inside of the launch; the next call is right all the same."""
        tools = instruments(trial.bench)
        if tools.lacks("exhaustion"):
            return None
        before = tools.current()
        with _placed(trial) as call:
            with tools.exhausted(trial.bench.device):
                try:
                    call({})
                except PolyaccelError:
                    pass
                except Exception as raised:
                    return self._fail("untyped error", f"{where}, no memory left: {type(raised).__name__}: {raised}")
            if tools.current() != before:
                return self._fail(
                    "current device changed",
                    f"{where}: left with device {tools.current()} current after an exception",
                )
        return self._unequal(_outputs(trial), wanted, f"{where}, after an exception")

    def _mixed(self, trial: Trial, other: Bench) -> Failure | None:
        """Each argument in turn on the other device."""
        if 0 in trial.problem.case.dims.values():
            return None
        foreign = Trial(other, trial.problem)
        with _placed(trial) as call, _arguments(foreign) as elsewhere, _arguments(trial) as own:
            unused = _unused(trial, own)
            names = [n for n, v in own.items() if isinstance(v, (torch.Tensor, *_PLACED)) and n not in unused]
            if len(names) < 2:
                return None
            for name in names:
                failure = self._refuses(trial, call, name, elsewhere[name])
                if failure is not None:
                    return failure
        return None

    def _refuses(self, trial: Trial, call: Call, name: str, value: object) -> Failure | None:
        message = f"{name} on {instruments(trial.bench).other.name}, everything else on {trial.bench.device.name}"
        try:
            result = call({name: value})
        except OperatorError as error:
            named = {operand.name.partition(".")[0] for operand in error.operands}
            devices = {operand.device for operand in error.operands}
            text = re.findall(r"\w+", str(error))
            if len(devices) < 2:
                return self._fail("mixed devices not described", f"{message}: {error}")
            if not (named | set(text)) & _names(trial, name):
                return self._fail("mixed devices not named", f"{message}: {error}")
            return None
        except PolyaccelError as error:
            return self._fail("wrong error for mixed devices", f"{message}: {type(error).__name__}: {error}")
        except Exception as error:
            return self._fail("untyped error", f"{message}: {type(error).__name__}: {error}")
        if _nothing_done(trial, result):
            return None
        return self._fail("mixed devices accepted", f"{message}: no error")

    def _unequal(self, got: Mapping[str, Output], wanted: Mapping[str, Output], where: str) -> Failure | None:
        for name, output in wanted.items():
            found = got.get(name)
            if found is None or found.bits.shape != output.bits.shape or not np.array_equal(found.bits, output.bits):
                return self._fail("wrong result on a device that is not current", f"{where}: {name} differs", name)
        return None

    def _fail(self, cause: str, message: str, output: str = "") -> Failure:
        return Failure(check=self.name, cause=cause, message=message, output=output)

    def control(self, bench: Bench) -> Control:
        """A ``linear`` that allocates on whatever device is current."""
        tools, problem = instruments(bench), linear_problem()
        devices = [bench.device, tools.other]

        def wrap(fn: Callable[..., Any]) -> Callable[..., Any]:
            def careless(x: torch.Tensor, weight: object) -> Any:
                devices[[d.index for d in devices].index(tools.current())].zeros((4096,), torch.float32)
                return fn(x, weight)

            return careless

        trial = Trial(wrong_bench(bench, problem, wrap), problem)
        try:
            return "did not fail" if self.run(trial) is None else "failed as it must"
        finally:
            trial.close()


class SteadyMemory(Check):
    """Calls that are made again and again hold no more memory than at first."""

    name = "memory.steady"

    rounds = 4

    def applies(self, case: Case, problem: Problem) -> bool:
        """One case in sixteen, whichever they are."""
        known = case.operator in OPERATORS or case.operator in STATIONS
        return known and case.device == "current" and case.stream == "default" and int(case.key, 16) % 16 == 0

    def unavailable(self, bench: Bench) -> str:
        return instruments(bench).lacks("memory")

    def run(self, trial: Trial) -> Failure | None:
        tools, device = instruments(trial.bench), trial.bench.device
        if trial.observe().error is not None:
            return None
        held = []
        for _ in range(self.rounds):
            _outputs(trial)
            held.append(tools.allocated(device))
        # The first rounds may fill caches and grow workspaces.
        if held[-1] > held[-2] > held[-3]:
            return Failure(
                check=self.name,
                cause="memory grows with every call",
                message=f"bytes held after each of {self.rounds} equal calls: {held}",
            )
        return None

    def control(self, bench: Bench) -> Control:
        kept: list[torch.Tensor] = []

        def wrap(fn: Callable[..., Any]) -> Callable[..., Any]:
            def leaking(x: torch.Tensor, weight: object) -> Any:
                kept.append(bench.device.zeros((1024,), torch.float32))
                return fn(x, weight)

            return leaking

        problem = linear_problem()
        trial = Trial(wrong_bench(bench, problem, wrap), problem)
        try:
            return "did not fail" if self.run(trial) is None else "failed as it must"
        finally:
            trial.close()


# -- calls -------------------------------------------------------------------------------------------------------------


def _bench_on(bench: Bench, device: Device) -> Bench:
    return Bench(bench.backend, device, bench.comm)


@contextmanager
def _arguments(trial: Trial) -> Iterator[dict[str, object]]:
    """All arguments of the call by name, made anew."""
    prepared = trial.problem.prepare(trial.bench)
    try:
        tensors = trial.tensors(trial.guarded(Setting()), Setting())
        yield {**prepared.arguments, **tensors}
    finally:
        prepared.release()


@contextmanager
def _placed(trial: Trial) -> Iterator[Call]:
    """The call with arguments of its own, some of which may be replaced."""
    prepared = trial.problem.prepare(trial.bench)
    try:
        tensors = trial.tensors(trial.guarded(Setting()), Setting())
        resolved = trial.resolve(prepared)

        def call(replaced: Mapping[str, object]) -> object:
            result = trial.call(resolved, prepared, {**tensors, **replaced})
            trial.bench.synchronize()
            return result

        yield call
    finally:
        prepared.release()


def _outputs(trial: Trial) -> dict[str, Output]:
    """One complete call, allocation to reading, on memory of its own."""
    prepared = trial.problem.prepare(trial.bench)
    try:
        tensors = trial.tensors(trial.guarded(Setting()), Setting())
        result = trial.call(trial.resolve(prepared), prepared, tensors)
        trial.bench.synchronize()
        return {name: Output(t) for name, t in prepared.collect(result, tensors).items()}
    finally:
        prepared.release()


def _unused(trial: Trial, arguments: Mapping[str, object]) -> set[str]:
    """Arguments that no part of a station looks at: the step, where only adapters need it and it names none."""
    reads_step = {"rotary_embedding", "write_kv_cache", "paged_attention"}
    step, parts = arguments.get("step"), trial.problem.spec.parts
    if not isinstance(step, Step) or not parts or reads_step & set(parts) or step.input.has_adapters:
        return set()
    return {"step"}


def _nothing_done(trial: Trial, result: object) -> bool:
    """Whether what came back is an operand as it was: then there was nothing to do with the others."""
    inputs = [operand.torch() for operand in trial.problem.operands.values()]
    return isinstance(result, torch.Tensor) and any(
        t.dtype == result.dtype and t.shape == result.shape and np.array_equal(bits_of(t), bits_of(result))
        for t in inputs
    )


def _names(trial: Trial, argument: str) -> set[str]:
    """What an error may call an argument: its own name; inside of a station, whatever a part calls it."""
    spec = trial.problem.spec
    names = {argument}
    for part in spec.parts:
        inner = OPERATORS.get(part) or STATIONS[part]
        names |= {a.name for a in inner.arguments}
    return names


DEVICE_CHECKS: Mapping[str, Check] = {check.name: check for check in (WrongCurrent(), SteadyMemory())}
