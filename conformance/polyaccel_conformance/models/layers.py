"""``model.layers``: every layer of the small models on the backend, each fed the reference's input."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from types import MappingProxyType
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch

from polyaccel.backend import AdapterRows, Collective, OperatorSpec, StepInput
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Case, Choice
from polyaccel_conformance.check import Check, Control, Failure, Level
from polyaccel_conformance.compare import compare
from polyaccel_conformance.device_check import as_given, first_case
from polyaccel_conformance.formats import Format
from polyaccel_conformance.models.chain import LayerInput, Mask, RankShare
from polyaccel_conformance.models.families import ADAPTERS, FAMILIES
from polyaccel_conformance.models.reference import Reference, Request, triples
from polyaccel_conformance.multi.problem import RankedProblem, nbytes
from polyaccel_conformance.operand import Operand
from polyaccel_conformance.oracle.bounded import Bounded, Expected, finish
from polyaccel_conformance.problem import Exactly, Prepared, Problem, ProblemSet
from polyaccel_conformance.problems.steps import Paging, build_step
from polyaccel_conformance.trial import Observation, Output, Trial

Floats = npt.NDArray[np.float64]

NAME = "model.layers"
PHASES = ("prefill", "decode", "mixed")
MIXES: Mapping[str, tuple[Mapping[int, float], ...]] = MappingProxyType(
    {
        "none": ({},),
        "one": ({0: 1.0},),
        "many": ({0: 1.0}, {}, {1: 1.0}, {1: -0.5, 2: 0.5}),
    }
)
"""Weights of adapters by slot, for one request after the other."""
LONGEST = 45
"""Of a context: more than twice the window of a family that has one, and several blocks."""
EXCHANGED = ("attention", "gate_up", "experts")
"""Stations whose results all ranks need: what is summed over ranks is made of them."""
CLEAR = 0.5
"""Share of the tokens whose experts must be beyond doubt, or the case shows nothing of them."""


class LayersProblem(RankedProblem):
    """One step of a few requests through all layers, one after the other and each on the reference's input.

    Attributes:
        requests: of the step; ``sabotaged``: a layer is wrong on purpose.
    """

    operands: Mapping[str, Operand] = MappingProxyType({})
    arithmetic = False

    def __init__(self, case: Case, rank: int = 0) -> None:
        super().__init__(case, rank)
        self.sabotaged = False
        self.family = FAMILIES[str(case.attributes["family"])]
        self.requests = self._requests()
        self._shares: tuple[RankShare, ...] = ()
        self._expected: Mapping[str, Expected] = MappingProxyType({})

    @property
    def spec(self) -> OperatorSpec:
        return OperatorSpec(
            name=NAME, group="model", semantics="Runs layers.", arguments=(), returns="results of their stations"
        )

    @property
    def replicated(self) -> frozenset[str]:  # type: ignore[override]
        ends = ("norm", "norm residual") if self.family.experts else ("down", "down residual")
        return frozenset(
            f"layers.{number}.{name}" for number in range(self.family.layers) for name in ("o", "o residual", *ends)
        )

    @property
    def tokens(self) -> int:
        return sum(request.queries for request in self.requests)

    def _requests(self) -> tuple[Request, ...]:
        phase, mixes = str(self.case.structure["phase"]), MIXES[str(self.case.structure["adapters"])]
        lengths = self.source.integers("lengths", (4,), 2, LONGEST).tolist()
        lengths[0] = LONGEST
        found = []
        for number, length in enumerate(lengths):
            # A mixed step has a token of one request, a chunk of others and the whole of the last.
            chunk = int(self.source.integers(f"chunk {number}", (1,), 1, length - 1)[0])
            mixed = 1 if not number else length if number == len(lengths) - 1 else chunk
            queries = {"prefill": length, "decode": 1}.get(phase, mixed)
            ids = self.source.integers(f"ids {number}", (length,), 0, self.family.vocabulary - 1)
            found.append(Request(ids=ids, queries=queries, mix=mixes[number % len(mixes)]))
        return tuple(found)

    @functools.cached_property
    def reference(self) -> Reference:
        """With every adapter, in the order of their slots."""
        return Reference(self.family, dict(enumerate(ADAPTERS.values())), self.case.dtype)

    @functools.cached_property
    def inputs(self) -> tuple[LayerInput, ...]:
        """Of each layer."""
        return self.reference.inputs(self.requests)

    # -- the run -----------------------------------------------------------------------------------------------------

    def place(self, bench: Bench) -> Prepared:
        from polyaccel_conformance.models.planted_layers import CONTROL, PLANTED_LAYERS
        from polyaccel_conformance.models.questions import workshop
        from polyaccel_conformance.models.rank_model import open_model

        name, shop = self.family.name, workshop(bench)
        adapters = list(shop.adapters(name).values()) if self.case.structure["adapters"] != "none" else []
        planted = PLANTED_LAYERS[CONTROL] if self.sabotaged else nullcontext
        with planted():
            model = open_model(bench, shop.model(name), name, self.case.dtype, adapters, self.rank, self.world_size)
        self._shares = model.shares
        queries = [request.queries for request in self.requests]
        contexts = [len(request.ids) for request in self.requests]
        paging = Paging.of(self.source, queries, contexts, bench.backend.kv_block_size())
        inputs = self._step(paging)
        inside = self.inputs

        def call() -> Mapping[str, torch.Tensor]:
            with bench.device.scope(), planted():
                kv = model.allocate(paging)
                for number, given in enumerate(inside):
                    model.remember(kv, number, given, paging)
                step = model.begin(inputs, kv)
                for number, given in enumerate(inside):
                    model.run(number, given, step, kv, inputs.kv_slots)
            return model.seen

        return Prepared(arguments={}, collect=as_given, call=call)

    def _step(self, paging: Paging) -> StepInput:
        queries = [request.queries for request in self.requests]
        use = triples(self.requests)
        rows = AdapterRows.build(use.rows.astype(np.int32), use.slots.astype(np.int32), use.mix.astype(np.float32))
        return build_step(
            self.source,
            queries,
            contexts=[len(request.ids) for request in self.requests],
            paging=paging,
            token_ids=np.concatenate([request.ids[request.older :] for request in self.requests]),
            adapters={"tokens": rows} if len(rows) else {},
            decode=self.case.structure["phase"] == "decode",
        )

    def collectives(self, prepared: Prepared) -> tuple[Collective, ...]:
        if self.world_size == 1:
            return ()
        sum_of_a_half = Collective("all_reduce", nbytes((self.tokens, self.family.hidden), self.case.dtype))
        return (sum_of_a_half,) * (2 * self.family.layers)

    def riding(self) -> int:
        used = any(request.mix for request in self.requests)
        return nbytes((self.tokens, sum(a.rank for a in ADAPTERS.values())), "float32") if used else 0

    # -- the verdict -------------------------------------------------------------------------------------------------

    def judge(self, outputs: Mapping[str, Output], others: Sequence[Mapping[str, Floats]]) -> Failure | None:
        """The first station that is wrong, in the order of the layers. ``others``: of every rank, what is exchanged."""
        expected: dict[str, Expected] = {}
        wrong: Failure | None = None
        for number, given in enumerate(self.inputs):
            witness = _Observed(f"layers.{number}.", outputs, others)
            try:
                self.reference.chain(number, self.requests, self._shares, self.rank).run(given, witness)
            except _Missing as missing:
                wrong = wrong or Failure(check=NAME, cause="no result", message=f"{missing.args[0]} gave none")
            expected |= witness.expected
            wrong = wrong or witness.wrong
        self._expected = expected
        return wrong

    def expected(self) -> Mapping[str, Expected | Exactly]:
        """Of the stations that were judged. It follows from what was observed, so that it cannot be kept for another
        run of the case."""
        return {**self._expected, NAME: Exactly(values=lambda _: None)}

    def digests(self) -> dict[str, str]:
        ids = {f"ids {i}": Operand(request.ids, "int64").digest() for i, request in enumerate(self.requests)}
        return ids | {"weights": self.reference.digest()}


class _Missing(Exception):
    """A station's result is not there."""


class _Observed:
    """What a run gave, compared with what is expected as the chain comes to it."""

    def __init__(self, prefix: str, outputs: Mapping[str, Output], others: Sequence[Mapping[str, Floats]]) -> None:
        self.expected: dict[str, Expected] = {}
        self.wrong: Failure | None = None
        self._prefix, self._outputs, self._others = prefix, outputs, others

    def see(self, station: str, expected: Bounded, to: Format, clear: Mask | None = None) -> Floats:
        name = self._prefix + station
        output = self._outputs.get(name)
        if output is None:
            raise _Missing(name)
        if station == "ids":
            return self._choices(name, output, expected, clear)
        wanted = finish(expected, to)
        if clear is not None and not clear.all():
            # Where another choice is as good, nothing is said about what belongs to it.
            tolerance = np.where(clear.reshape(-1, *[1] * (wanted.value.ndim - 1)), wanted.tolerance, np.inf)
            wanted = Expected(wanted.value, tolerance, to, False, wanted.terms)
        values = output.values.reshape(wanted.value.shape).astype(np.float64)
        found = compare(wanted, values, output.dtype)
        if found is None:
            self.expected[name] = wanted
        elif self.wrong is None:
            named = replace(found, message=f"{name}: {found.message}")
            self.wrong = Failure(check=NAME, output=name, **asdict(named))
        return values

    def ranks(self, station: str) -> Sequence[Floats]:
        return [other[self._prefix + station] for other in self._others]

    def _choices(self, name: str, output: Output, expected: Bounded, clear: Mask | None) -> Floats:
        assert clear is not None
        values = output.values.astype(np.float64)
        same = (values == expected.value).all(-1)
        if clear.mean() < CLEAR:
            reason = f"{name}: the choice of experts is beyond doubt for {clear.mean():.0%} of the tokens only"
            self.wrong = self.wrong or Failure(check=NAME, cause="shows nothing", message=reason, output=name)
        elif not same[clear].all():
            row = int(np.flatnonzero(clear & ~same)[0])
            reason = f"{name}: token {row} goes to {values[row].astype(int).tolist()}, "
            reason += f"the best experts are {expected.value[row].astype(int).tolist()}"
            self.wrong = self.wrong or Failure(check=NAME, cause="other experts", message=reason, output=name)
        return values


class LayersCheck(Check):
    """Every station of every layer is within its bound; on several ranks, each of them."""

    name = NAME
    tier = 2

    def applies(self, case: Case, problem: Problem) -> bool:
        return case.operator == NAME

    def run(self, trial: Trial) -> Failure | None:
        problem = trial.problem
        assert isinstance(problem, LayersProblem)
        observation = trial.ask()
        return problem.judge(observation.outputs, self._exchange(trial, observation))

    def _exchange(self, trial: Trial, observation: Observation) -> Sequence[Mapping[str, Floats]]:
        own = {
            name: output.values.reshape(len(output.values), -1).astype(np.float64)
            for name, output in observation.outputs.items()
            if name.rpartition(".")[2] in EXCHANGED
        }
        if trial.problem.case.ranks == 1:
            return [own]
        from polyaccel_conformance.multi.bench import rank_bench

        gathered = rank_bench(trial.bench).control.gather(self.name, own)
        return [values for values in gathered if isinstance(values, dict)]

    def control(self, bench: Bench) -> Control:
        """The same with a wrong layer on the same device."""
        problem = LayersProblem(first_case(LayersProblems()))
        problem.sabotaged = True
        trial = Trial(bench, problem)
        try:
            return "failed as it must" if self.run(trial) is not None else "did not fail"
        finally:
            trial.close()


class LayersProblems(ProblemSet):
    """Every family in every phase, without, with one and with several adapters."""

    operator = NAME
    weight = 25
    levels: ClassVar[tuple[Level, ...]] = ("L2", "L3")

    def axes(self) -> Mapping[str, Sequence[Choice]]:
        return {
            "dtype": ("float32", "bfloat16", "float16"),
            "attributes.family": tuple(FAMILIES),
            "structure.phase": PHASES,
            "structure.adapters": tuple(MIXES),
        }

    def mend(self, axes: dict[str, Choice]) -> dict[str, Choice] | None:
        world = axes.get("ranks", 1)
        assert isinstance(world, int)
        # The contract has no cut of a query head.
        return axes if world <= FAMILIES[str(axes["attributes.family"])].heads else None

    def problem(self, case: Case) -> Problem:
        return LayersProblem(case)


LAYER_CHECKS: Mapping[str, Check] = MappingProxyType({NAME: LayersCheck()})
