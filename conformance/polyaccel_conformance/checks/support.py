"""Whether a backend's answers about what it can do, and its refusals of bad operands, are what the contract asks."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from polyaccel.backend import Entry, OperatorError, PolyaccelError, Query
from polyaccel.backend.stations import STATIONS, parts_of
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Case
from polyaccel_conformance.check import Check, Control, Failure
from polyaccel_conformance.compare import excess
from polyaccel_conformance.harness.controls import all_of, linear_problem, verdict, wrong_bench
from polyaccel_conformance.harness.evidence import Watch
from polyaccel_conformance.harness.layouts import CONTIGUOUS
from polyaccel_conformance.harness.memory import Poison
from polyaccel_conformance.oracle.bounded import Expected
from polyaccel_conformance.problem import Exactly, Prepared, Problem
from polyaccel_conformance.trial import Output, Setting, Trial, returned

TURNS = 3
Function = Callable[..., Any]


class Pure(Check):
    """``supports`` answers from the query alone: twice the same, on the host, in sentences; and what it refuses has a
    composite."""

    name = "support.pure"

    def applies(self, case: Case, problem: Problem) -> bool:
        return super().applies(case, problem) and problem.spec.group != "ranks"

    def run(self, trial: Trial) -> Failure | None:
        bench, operator = trial.bench, trial.problem.case.operator
        query = trial.posed().query(operator)
        queries = [query]
        if operator in STATIONS:
            queries += [query.for_part(part) for part in parts_of(operator, query)]
        table = bench.table
        for asked in queries:
            entries = table.get(asked.operator, ())
            refused = True
            for entry in entries:
                found = self._entry(bench, asked, entry)
                if found is not None:
                    return found
                refused = refused and bool(entry.supports(asked))
            if refused and asked.operator not in STATIONS and asked.operator not in bench.composites:
                message = f"every entry of {asked.operator} refuses this, and there is no composite to run instead"
                return Failure(check=self.name, cause="refused without a composite", message=message)
        return None

    def _entry(self, bench: Bench, query: Query, entry: Entry) -> Failure | None:
        launches = bench.backend.ledger.launches
        with Watch(Poison.ZERO, {}) as watch:
            first, second = entry.supports(query), entry.supports(replace(query))
        if first != second:
            message = f"{query.operator}: first {first}, then {second}"
            return Failure(check=self.name, cause="answers differ", message=message)
        if watch.activity().dispatched or bench.backend.ledger.launches != launches:
            message = f"{query.operator}: supports() used the device; it has to answer on the host, from the query"
            return Failure(check=self.name, cause="not host-only", message=message)
        for reason in first:
            if not isinstance(reason, str) or len(reason.split()) < 3:
                message = f"{query.operator}: {reason!r} is no sentence with the limit and the value asked for"
                return Failure(check=self.name, cause="reason is no sentence", message=message)
        return None

    def control(self, bench: Bench) -> Control:
        answers = iter(range(1000))

        def fickle(query: Query) -> list[str]:
            return [f"asked {next(answers)} times before, which is too often"]

        def device(query: Query) -> list[str]:
            return ["the device is too full"] if torch.zeros(2).sum() else []

        def mute(query: Query) -> list[str]:
            return ["no"]

        return all_of(*(self._control(bench, supports) for supports in (fickle, device, mute)))

    def _control(self, bench: Bench, supports: Callable[[Query], list[str]]) -> Control:
        problem = linear_problem()
        entry = next(iter(wrong_bench(bench, problem, lambda fn: fn).backend.table()["linear"]))
        from polyaccel_conformance.harness.overlay import Overlay

        wrong = Bench(Overlay(bench.backend, {"linear": replace(entry, supports=supports)}), bench.device, bench.comm)
        trial = Trial(wrong, problem)
        try:
            return "did not fail" if self.run(trial) is None else "failed as it must"
        finally:
            trial.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bad:
    """A call with one operand that the contract does not allow."""

    argument: str
    what: str
    tensor: torch.Tensor


class BadArguments(Check):
    """An operand of another dtype, width or device is refused by a typed error that names it, before any operand is
    written to; or the result is right all the same. Asked of cases whose operands are all contiguous, a third of the
    bad operands in turn."""

    name = "errors.arguments"

    def applies(self, case: Case, problem: Problem) -> bool:
        plain = all(case.layout(name) == CONTIGUOUS for name in problem.operands) and case.alias == "none"
        ordinary = case.stream == "default" and case.device == "current" and problem.spec.group != "ranks"
        return super().applies(case, problem) and plain and ordinary and bool(problem.operands)

    def run(self, trial: Trial) -> Failure | None:
        setting = Setting()
        part = 0
        for name in trial.problem.operands:
            tensors = trial.tensors(trial.guarded(setting), setting)
            for bad in self._bad(trial, name, tensors[name]):
                part += 1
                if not trial.asks(part, TURNS):
                    continue
                found = self._refused(trial, bad, {**tensors, name: bad.tensor})
                if found is not None:
                    return found
        return None

    def _bad(self, trial: Trial, name: str, tensor: torch.Tensor) -> list[_Bad]:
        found = []
        other = torch.float64 if tensor.dtype.is_floating_point else torch.float32
        turned = tensor.to(other)
        if turned.dtype != other:
            # A device without that dtype gives another one instead, which may be the right one.
            turned = tensor.to(torch.int32)
        found.append(_Bad(argument=name, what=f"dtype {turned.dtype}", tensor=turned))
        if tensor.dim() and tensor.shape[-1] > 1 and _width_is_fixed(trial.problem, name):
            shape = (*tensor.shape[:-1], tensor.shape[-1] + 1)
            found.append(
                _Bad(argument=name, what=f"shape {list(shape)}", tensor=torch.nn.functional.pad(tensor, (0, 1)))
            )
        if trial.bench.torch_device.type != "cpu" and len(trial.problem.operands) > 1:
            found.append(_Bad(argument=name, what="device cpu", tensor=tensor.cpu()))
        return found

    def _refused(self, trial: Trial, bad: _Bad, tensors: Mapping[str, torch.Tensor]) -> Failure | None:
        prepared = trial.prepare()
        storages = {tensor.untyped_storage().data_ptr(): name for name, tensor in tensors.items()}
        watch = Watch(Poison.ZERO, storages)
        try:
            resolved = trial.resolve(prepared)
            with watch:
                result = trial.call(resolved, prepared, tensors)
                trial.bench.synchronize()
            untouched = all(not t.numel() or t.untyped_storage().data_ptr() in storages for t in returned(result))
            if untouched and not watch.activity().operators:
                # There was nothing to do, and nothing was done with the operand.
                return None
            return self._handled(trial, bad, prepared, result, tensors)
        except OperatorError as error:
            return self._error(trial, bad, error, watch)
        except PolyaccelError as error:
            return self._failure("another error", bad, f"raised {type(error).__name__}, not OperatorError: {error}")
        except Exception as error:
            return self._failure("untyped error", bad, f"raised {type(error).__name__}: {error}")
        finally:
            trial.release(prepared)

    def _handled(
        self, trial: Trial, bad: _Bad, prepared: Prepared, result: object, tensors: Mapping[str, torch.Tensor]
    ) -> Failure | None:
        """Taken, which the contract does not ask for: then it has to be right."""
        if returned(result) and all(t is bad.tensor for t in returned(result)):
            # An operand that was to be changed and was not, for there was nothing to do.
            before = trial.problem.operands[bad.argument].torch()
            if torch.equal(bad.tensor.cpu()[tuple(slice(n) for n in before.shape)], before.to(bad.tensor.dtype)):
                return None
        else:
            outputs = {name: Output(tensor) for name, tensor in prepared.collect(result, tensors).items()}
            trial.bench.synchronize()
            if all(_right(expected, outputs[name]) for name, expected in trial.expected.items() if name in outputs):
                return None
        return self._failure("accepted", bad, "was accepted, and the result is wrong")

    def _error(self, trial: Trial, bad: _Bad, error: OperatorError, watch: Watch) -> Failure | None:
        writes = watch.activity().operand_writes
        if writes:
            return self._failure("refused late", bad, f"was refused after operands had been written to: {dict(writes)}")
        named = any(operand.name == bad.argument for operand in error.operands)
        planned = trial.planned
        if planned is not None and planned.kind == "parts":
            # A part has its own name for what the station calls otherwise.
            named = named or any(operand.shape == tuple(bad.tensor.shape) for operand in error.operands)
        if not named and re.search(rf"\b{re.escape(bad.argument)}\b", error.reason) is None:
            return self._failure("error names no argument", bad, f"was refused without naming it: {error}")
        return None

    def _failure(self, cause: str, bad: _Bad, message: str) -> Failure:
        kind = bad.what.partition(" ")[0]
        return Failure(
            check=self.name,
            cause=f"{kind} of {bad.argument!r}: {cause}",
            message=f"argument {bad.argument!r} of {bad.what} {message}",
        )

    def control(self, bench: Bench) -> Control:
        def takes_all(fn: Function) -> Function:
            def wrong(x: torch.Tensor, weight: object) -> torch.Tensor:
                return torch.zeros(5, 8, device=bench.torch_device)

            return wrong

        def untyped(fn: Function) -> Function:
            def wrong(x: torch.Tensor, weight: object) -> torch.Tensor:
                # What the plan does not turn into an error of the contract.
                raise KeyError("no kernel for this")

            return wrong

        def nameless(fn: Function) -> Function:
            def wrong(x: torch.Tensor, weight: object) -> torch.Tensor:
                raise OperatorError("linear", "bad call")

            return wrong

        problem = linear_problem(layout=CONTIGUOUS)
        return all_of(*(verdict(bench, self, problem, wrap) for wrap in (takes_all, untyped, nameless)))


def _width_is_fixed(problem: Problem, argument: str) -> bool:
    """Whether an argument's last dimension is that of a weight, a cache or a vector as well."""
    shape = problem.spec.argument(argument).shape
    width = shape.strip("[]").rpartition(",")[2].strip()
    for other in problem.spec.arguments:
        if other.kind in ("weight", "kv") and width in ("k", "n", "head_dim"):
            return True
        given = other.name in problem.operands and other.name != argument
        if given and other.kind == "tensor" and width == other.shape.strip("[]").rpartition(",")[2].strip():
            return other.shape.count(",") == 0 or shape.count(",") == 0
    return False


def _right(expected: Expected | Exactly, output: Output) -> bool:
    if isinstance(expected, Exactly):
        wanted = expected.values
        if callable(wanted):
            return wanted(output.values) is None
        return isinstance(wanted, np.ndarray) and np.array_equal(wanted, output.values)
    # A result in a wider format is right where it rounds to a right one, overflow included.
    values = expected.format.round(output.values.astype(np.float64))
    if values.shape != expected.value.shape:
        return False
    return not bool((excess(expected, values) > 1).any())


SUPPORT_CHECKS: Mapping[str, Check] = {check.name: check for check in (Pure(), BadArguments())}
