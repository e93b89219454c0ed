"""All runs of one problem on one bench, made when first asked for and shared by the checks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import torch

from polyaccel.backend import Planned, PolyaccelError
from polyaccel_conformance.bench import Bench, call_by_name
from polyaccel_conformance.formats import bits_of, from_torch
from polyaccel_conformance.harness.memory import Guarded, Poison
from polyaccel_conformance.oracle.bounded import Expected
from polyaccel_conformance.problem import Exactly, Problem

Array = npt.NDArray[np.generic]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How a call is made. Two settings that differ must give the same bits."""

    poison: Poison = Poison.NAN
    repeat: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Output:
    """One output on the host: ``values`` float64 or int64, ``bits`` as integers, and its torch dtype."""

    values: Array
    bits: Array
    dtype: torch.dtype


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Observation:
    """What one call did.

    Attributes:
        outputs: by name; empty after an error.
        error: what it raised.
        trespassed, changed: by argument, elements written outside of it and elements of it that changed.
        ledger: what the backend says ran.
        planned: what the plan said would run.
    """

    outputs: Mapping[str, Output]
    error: PolyaccelError | None
    trespassed: Mapping[str, int]
    changed: Mapping[str, int]
    ledger: Mapping[str, int]
    planned: Planned | None


@dataclass(slots=True)
class Trial:
    """Runs ``problem`` on ``bench`` in every setting that some check asks for, once each."""

    bench: Bench
    problem: Problem
    _seen: dict[Setting, Observation] = field(default_factory=dict)
    _crashed: dict[Setting, Exception] = field(default_factory=dict)
    _expected: Mapping[str, Expected | Exactly] | None = None

    @property
    def expected(self) -> Mapping[str, Expected | Exactly]:
        if self._expected is None:
            self._expected = self.problem.expected()
        return self._expected

    def observe(self, setting: Setting = Setting()) -> Observation:
        """The observation in a setting. Raises what is not a PolyaccelError, the same exception each time it is asked
        for: a crash is the runner's to record."""
        if setting in self._crashed:
            raise self._crashed[setting]
        if setting not in self._seen:
            try:
                self._seen[setting] = self._run(setting)
            except Exception as raised:
                self._crashed[setting] = raised
                raise
        return self._seen[setting]

    def seen(self) -> Observation | None:
        """The first observation that some check asked for, if any."""
        return next(iter(self._seen.values()), None)

    def _run(self, setting: Setting) -> Observation:
        problem, bench = self.problem, self.bench
        guarded = {
            name: Guarded(operand, problem.case.layout(name), setting.poison, bench.upload)
            for name, operand in problem.operands.items()
        }
        tensors = self._aliased({name: buffer.tensor for name, buffer in guarded.items()})
        prepared = problem.prepare(bench)
        before = bench.backend.ledger.counts()
        planned: Planned | None = None
        outputs: dict[str, Output] = {}
        error: PolyaccelError | None = None
        try:
            resolved = bench.resolve(problem.case.operator, prepared)
            planned = resolved.planned
            order = tuple(argument.name for argument in problem.spec.arguments)
            result = call_by_name(resolved.call, order, {**tensors, **prepared.arguments})
            collected = prepared.collect(result, tensors)
            bench.synchronize()
            outputs = {
                name: Output(values=from_torch(t), bits=bits_of(t), dtype=t.dtype) for name, t in collected.items()
            }
        except PolyaccelError as raised:
            error = raised
        finally:
            prepared.release()
        after = bench.backend.ledger.counts()
        return Observation(
            outputs=MappingProxyType(outputs),
            error=error,
            trespassed={name: count for name, buffer in guarded.items() if (count := buffer.trespassed())},
            changed={name: count for name, buffer in guarded.items() if (count := buffer.changed())},
            ledger={name: count - before.get(name, 0) for name, count in after.items() if count != before.get(name, 0)},
            planned=planned,
        )

    def _aliased(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        alias, _, original = self.problem.case.alias.partition("=")
        if original:
            tensors[alias] = tensors[original]
        return tensors
