"""All runs of one problem on one bench, made when first asked for and shared by the checks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields, is_dataclass, replace
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import torch

from polyaccel.backend import OperatorError, Planned, PolyaccelError, Query, Step, StepInput, TokenClass
from polyaccel.backend.support import Static
from polyaccel_conformance.bench import SITE, Bench, Resolved, call_by_name
from polyaccel_conformance.formats import bits_of, from_torch
from polyaccel_conformance.harness import state
from polyaccel_conformance.harness.evidence import Activity, Watch
from polyaccel_conformance.harness.kernels import KernelTrace
from polyaccel_conformance.harness.layouts import promised
from polyaccel_conformance.harness.memory import Guarded, Poison
from polyaccel_conformance.oracle.bounded import Expected
from polyaccel_conformance.problem import Exactly, Prepared, Problem
from polyaccel_conformance.simulated.factories import virtual_device

Array = npt.NDArray[np.generic]

Around = Callable[[Bench], AbstractContextManager[object]]
"""Entered around the call and the wait for the device: another current device, a side stream, a profiler."""

NEW_MEMORY = "(new memory)"
STATE = 5
"""In one case of so many weights, caches and adapters are read back around a call."""
BOTH = 4
"""In one case of so many both poisons are laid out; in the others the second only where the first says nothing."""
_STATELESS = frozenset({"tensor", "weight", "attribute", "rope"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How a call is made. Two settings that differ must give the same bits, but for ``row`` and ``equal``.

    Attributes:
        poison: what lies around, between and in new memory.
        watched: new memory is poisoned and guarded, and the observation has an activity. Always so with ``NAN`` and
            ``LARGE``; torch then calls Python for every operator.
        repeat: tells calls apart that are made alike.
        contiguous: every tensor dense, whatever the case's layouts.
        row: only this token of every tensor whose first dimension is T.
        equal: ``(a, b)``: argument a holds the values of argument b; with ``shared`` it is the same view.
        around: entered around the call.
    """

    poison: Poison = Poison.ZERO
    watched: bool = False
    repeat: int = 0
    contiguous: bool = False
    row: int | None = None
    equal: tuple[str, str] | None = None
    shared: bool = False
    around: Around | None = None


POISONED = Setting(poison=Poison.NAN)
LARGE = Setting(poison=Poison.LARGE)


class Output:
    """One output as it is now, on the host: ``bits`` as integers, and its torch dtype."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._host = tensor.detach().to("cpu", copy=True).contiguous()
        self.dtype = tensor.dtype
        self.bits = bits_of(self._host)

    @functools.cached_property
    def values(self) -> Array:
        """Float64 or int64; most outputs are only compared bit by bit."""
        return from_torch(self._host)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Observation:
    """What one call did.

    Attributes:
        outputs: by name; empty after an error.
        error: what it raised.
        trespassed, changed: by argument, elements written outside of it and elements of it that changed;
            :data:`NEW_MEMORY` for what the call allocated itself.
        disturbed: by name, elements of weights, caches and adapters that changed and may not; of :data:`POISONED` only,
            and where the case asks for it.
        fresh: elements of returned tensors that lie in no operand's memory.
        ledger: what the backend says ran.
        planned: what the plan said would run.
        activity: what was dispatched; None where the call was not watched.
    """

    outputs: Mapping[str, Output]
    error: PolyaccelError | None
    trespassed: Mapping[str, int]
    changed: Mapping[str, int]
    ledger: Mapping[str, int]
    planned: Planned | None
    disturbed: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    fresh: int = 0
    activity: Activity | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Posed:
    """What a plan is asked for a problem, and what its step says; None where it has no step."""

    token_class: TokenClass
    adapters: bool
    static: Mapping[str, Static]
    ranges: Mapping[str, tuple[int, int]]
    inputs: StepInput | None

    @classmethod
    def of(cls, prepared: Prepared) -> Posed:
        step = next((value for value in prepared.arguments.values() if isinstance(value, Step)), None)
        return cls(
            token_class=prepared.token_class,
            adapters=prepared.adapters,
            static=prepared.static,
            ranges=prepared.ranges,
            inputs=None if step is None else step.input,
        )

    def query(self, operator: str) -> Query:
        """As the plan asks it."""
        return Query(
            site=SITE,
            operator=operator,
            token_class=self.token_class,
            adapters=self.adapters,
            static=self.static,
            ranges=self.ranges,
        )


@dataclass(slots=True)
class Trial:
    """Runs ``problem`` on ``bench`` in every setting that some check asks for, once each.

    What the call cannot change, or what can be put back (``Prepared.again``), is placed once and shared; the tensor
    arguments and the step are new for each call. :meth:`close` gives it back.

    Attributes:
        thorough: every part of every question is asked, see :meth:`asks`; a run of all checks is not.
        kept: by check, what it found and needs again.
    """

    bench: Bench
    problem: Problem
    _seen: dict[Setting, Observation] = field(default_factory=dict)
    _crashed: dict[Setting, Exception] = field(default_factory=dict)
    _expected: Mapping[str, Expected | Exactly] | None = None
    _host: dict[str, torch.Tensor] = field(default_factory=dict)
    _shared: Prepared | None = None
    _room: state.Room | None = None
    _posed: Posed | None = None
    _resolved: Resolved | None = None
    _lent: bool = False
    thorough: bool = True
    kept: dict[str, list[str]] = field(default_factory=dict)

    @property
    def expected(self) -> Mapping[str, Expected | Exactly]:
        if self._expected is None:
            self._expected = self.problem.expected()
        return self._expected

    def observe(self, setting: Setting = Setting()) -> Observation:
        """The observation in a setting. Raises what is not a PolyaccelError, the same exception each time it is asked
        for: a crash is the runner's to record."""
        seen = self._seen.get(setting)
        if seen is not None:
            return seen
        if setting in self._crashed:
            raise self._crashed[setting]
        try:
            seen = self._seen[setting] = self._run(setting)
        except Exception as raised:
            self._crashed[setting] = raised
            raise
        return seen

    @property
    def planned(self) -> Planned | None:
        """What the plan said would run; None before the first call."""
        return None if self._resolved is None else self._resolved.planned

    def ask(self, setting: Setting = Setting()) -> Observation:
        """The same for checks that expect no error: raises the backend's."""
        observation = self.observe(setting)
        if observation.error is not None:
            raise observation.error
        return observation

    def excuses(self, error: PolyaccelError) -> bool:
        """Whether a typed error is a right answer to this case: it holds a layout or an alias that the contract does
        not make implementations accept."""
        if not isinstance(error, OperatorError):
            return False
        spec, case = self.problem.spec, self.problem.case
        if any(not promised(spec.argument(name), case.layout(name)) for name in self.problem.operands):
            return True
        alias, _, original = case.alias.partition("=")
        return bool(original) and original not in spec.argument(alias).may_alias

    def asks(self, part: int, of: int) -> bool:
        """Whether this case asks ``part`` of a question whose parts take turns over the cases, one in ``of`` of them.

        There are many cases of each operator, and calls are what a case takes its time for. A check that is asked
        alone, as in shrinking, asks all.
        """
        return self.thorough or (int(self.problem.case.key, 16) + part) % of == 0

    def poisoned(self) -> tuple[Setting, ...]:
        """The calls with poison that every check may look at."""
        return (POISONED, LARGE) if self.asks(0, BOTH) else (POISONED,)

    def seen(self) -> Observation | None:
        """The first observation that some check asked for, if any."""
        return next(iter(self._seen.values()), None)

    def close(self) -> None:
        """Release what the calls shared. The observations stay."""
        if self._shared is not None:
            if not self._lent:
                self._shared.release()
            self._shared = self._room = None

    def beside(self, problem: Problem) -> Trial:
        """A trial of a problem that differs in its operands alone: it uses what is placed for this one."""
        return Trial(
            self.bench,
            problem,
            _shared=self._shared,
            _resolved=self._resolved,
            _lent=self._shared is not None,
            thorough=self.thorough,
        )

    # -- pieces of a call, for checks that make calls of their own -----------------------------------------------------

    def prepare(self) -> Prepared:
        """Weights, caches, and the step begun. On shared memory where the operator can change none of it, or what it
        can change is put back."""
        return self._prepare(keep=True)

    def _prepare(self, *, keep: bool) -> Prepared:
        # A plain call that is the first has everything to itself: nothing has waited for the device, and a buffer that
        # keeps its address does not hold already what is still on its way there. The host keeps nobody waiting.
        keep = keep or self.bench.torch_device.type == "cpu"
        shared = self._shared
        if shared is not None:
            return shared if shared.again is None else replace(shared, arguments={**shared.arguments, **shared.again()})
        prepared = self.problem.prepare(self.bench)
        self._posed = Posed.of(prepared)
        if (keep and prepared.again is not None) or all(a.kind in _STATELESS for a in self.problem.spec.arguments):
            self._shared = prepared
        return prepared

    def posed(self) -> Posed:
        """What the case asks for, which depends on the case only: nothing is placed for it once something was."""
        if self._posed is None:
            self.release(self.prepare())
            assert self._posed is not None
        return self._posed

    def release(self, prepared: Prepared) -> None:
        if self._shared is None:
            prepared.release()

    def resolve(self, prepared: Prepared) -> Resolved:
        """The plan's answer, which depends on the case only."""
        if prepared.call is not None:
            return self.bench.resolve(self.problem.case.operator, prepared)
        if self._resolved is None:
            self._resolved = self.bench.resolve(self.problem.case.operator, prepared)
        return self._resolved

    def call(self, resolved: Resolved, prepared: Prepared, tensors: Mapping[str, object]) -> object:
        """The bare call, with the tensor arguments ``tensors``."""
        order = tuple(argument.name for argument in self.problem.spec.arguments)
        return call_by_name(resolved.call, order, {**prepared.arguments, **tensors})

    def guarded(self, setting: Setting) -> dict[str, Guarded]:
        """The tensor arguments on the device, in the layouts of the case."""
        return {
            name: Guarded(self._values(name, setting), self._layout(name, setting), setting.poison, self.bench.upload)
            for name in self.problem.operands
        }

    def tensors(self, guarded: Mapping[str, Guarded], setting: Setting) -> dict[str, torch.Tensor]:
        """The views to pass, aliases included."""
        tensors = {name: buffer.tensor for name, buffer in guarded.items()}
        alias, _, original = self.problem.case.alias.partition("=")
        if original:
            tensors[alias] = tensors[original]
        if setting.equal is not None and setting.shared:
            tensors[setting.equal[0]] = tensors[setting.equal[1]]
        return tensors

    # ------------------------------------------------------------------------------------------------------------------

    def _run(self, setting: Setting) -> Observation:
        bench, problem = self.bench, self.problem
        guarded = self.guarded(setting)
        tensors = self.tensors(guarded, setting)
        storages = {buffer.storage: name for name, buffer in guarded.items()}
        watched = setting.watched or setting.poison is not Poison.ZERO
        watch = Watch(setting.poison, storages) if watched else None
        trace = None if watch is None or virtual_device(bench.torch_device) is None else KernelTrace(bench.torch_device)
        prepared = self._prepare(keep=watched)
        shared = self._shared is not None
        planned: Planned | None = None
        outputs: dict[str, Output] = {}
        error: PolyaccelError | None = None
        before: dict[str, torch.Tensor] = {}
        disturbed: dict[str, int] = {}
        fresh = 0
        counts = bench.backend.ledger.counts()
        try:
            if watch is not None:
                room = self._room if self._room is not None else state.Room(bench, problem, prepared)
                self._room = room if shared else None
                room.poison(setting.poison)
                if setting == POISONED and self.asks(1, STATE):
                    before = state.snapshot(bench, problem, prepared)
                # What was only queued so far is not the call's.
                bench.synchronize()
            resolved = self.resolve(prepared)
            planned = resolved.planned
            counts = bench.backend.ledger.counts()
            around = setting.around(bench) if setting.around is not None else nullcontext()
            with around, trace or nullcontext(), watch if watch is not None else nullcontext():
                result = self.call(resolved, prepared, tensors)
                if watch is not None:
                    watch.returned()
                bench.synchronize()
            ran = bench.backend.ledger.counts()
            fresh = sum(t.numel() for t in returned(result) if _address(t) not in storages)
            collected = prepared.collect(result, tensors)
            bench.synchronize()
            outputs = {name: Output(tensor) for name, tensor in collected.items()}
            if before:
                disturbed = state.changed(before, state.snapshot(bench, problem, prepared))
        except PolyaccelError as raised:
            error, ran = raised, bench.backend.ledger.counts()
        finally:
            self.release(prepared)
            if error is not None:
                # Who knows what it left behind.
                self.close()
        differences = {name: buffer.differences() for name, buffer in guarded.items()}
        trespassed = {name: outside for name, (outside, _) in differences.items() if outside}
        if watch is not None and (beyond := watch.allocations.trespassed()):
            trespassed[NEW_MEMORY] = beyond
        return Observation(
            outputs=MappingProxyType(outputs),
            error=error,
            trespassed=trespassed,
            changed={name: inside for name, (_, inside) in differences.items() if inside},
            ledger={name: count - counts.get(name, 0) for name, count in ran.items() if count != counts.get(name, 0)},
            planned=planned,
            disturbed=disturbed,
            fresh=fresh,
            activity=None if watch is None else watch.activity(() if trace is None else trace.kernels),
        )

    def _values(self, name: str, setting: Setting) -> torch.Tensor:
        if setting.equal is not None and setting.equal[0] == name:
            name = setting.equal[1]
        if name not in self._host:
            self._host[name] = self.problem.operands[name].torch()
        values = self._host[name]
        if setting.row is not None and by_token(self.problem.spec.argument(name).shape):
            values = values[setting.row : setting.row + 1]
        return values

    def _layout(self, name: str, setting: Setting) -> str:
        return "contiguous" if setting.contiguous else self.problem.case.layout(name)


def by_token(shape: str) -> bool:
    """Whether the first dimension of an argument of this specified shape counts tokens."""
    return shape.startswith(("[T", "[..."))


def returned(result: object) -> list[torch.Tensor]:
    """All tensors of a call's result: one, several, or the fields of a dataclass."""
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, tuple | list):
        return [t for part in result for t in returned(part)]
    if is_dataclass(result) and not isinstance(result, type):
        return [t for entry in fields(result) for t in returned(getattr(result, entry.name))]
    return []


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else 0
