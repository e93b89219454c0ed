"""Whether a captured step reads the step it is replayed with, and what an adapter costs in it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np

from polyaccel.backend import Graph, GraphKey, Planned, SampleOutput, Step
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Case
from polyaccel_conformance.check import Check, Control, Failure
from polyaccel_conformance.harness.controls import all_of
from polyaccel_conformance.harness.devices import instruments
from polyaccel_conformance.harness.graphs import RANK_ROWS, ROWS, DecodeStep, MiniModel, replayed_steps
from polyaccel_conformance.problem import Problem
from polyaccel_conformance.trial import Trial

WITH_ADAPTERS = GraphKey(rows=ROWS, rank_rows=1 << (RANK_ROWS - 1).bit_length())
WITHOUT = GraphKey(rows=ROWS, rank_rows=0)
SWAPS = 20
VARIANTS = 3
"""Different data of the model. A case asks with the one that its seed names; equal ones are asked once a bench."""

Replay = Callable[[Step], SampleOutput]


class ModelCheck(Check):
    """A question about the small model, asked by the cases of one operator."""

    operator = "sgmv"

    def applies(self, case: Case, problem: Problem) -> bool:
        return case.operator == self.operator

    def run(self, trial: Trial) -> Failure | None:
        key = f"{self.name} {trial.problem.case.seed % VARIANTS}"
        memo = trial.bench.memo
        if key not in memo:
            memo[key] = self.ask(trial.bench, trial.problem.case.seed % VARIANTS)
        found = memo[key]
        return found if isinstance(found, Failure) else None

    @abstractmethod
    def ask(self, bench: Bench, seed: int) -> Failure | None:
        """Once, with the model of this seed."""

    def fail(self, cause: str, message: str) -> Failure:
        return Failure(check=self.name, cause=cause, message=message)


class GraphReplay(ModelCheck):
    """A graph replayed with other data, other adapters, more adapter rows, fewer rows and again the same leaves exactly
    what the same steps leave eagerly, and every replay adds the same launches to the ledger."""

    name = "graph.replay"
    operator = "linear"

    def unavailable(self, bench: Bench) -> str:
        return "; ".join(bench.backend.graph_refusals())

    def ask(self, bench: Bench, seed: int) -> Failure | None:
        return self._compare(bench, seed, lambda graph, example: graph.replay)

    def _compare(self, bench: Bench, seed: int, replay_of: Callable[[Graph, Step], Replay]) -> Failure | None:
        steps, size = replayed_steps(100 * seed), bench.backend.kv_block_size()
        eager, captured = MiniModel(bench, seed), MiniModel(bench, seed)
        # What eager steps leave is collected first: backends may share the buffers of steps between states.
        wanted = [eager.observe(eager.forward(eager.begin(step.inputs(size)))) for step in steps]
        example = captured.begin(steps[0].inputs(size))
        with _captured(bench, WITH_ADAPTERS, captured, example) as graph:
            replay, first = replay_of(graph, example), None
            for step, left in zip(steps, wanted, strict=True):
                issued = captured.begin(step.inputs(size))
                with bench.backend.ledger.capture() as counted:
                    output = replay(issued)
                got = captured.observe(output)
                wrong = [name for name, bits in left.items() if not np.array_equal(bits, got[name])]
                if wrong:
                    return self.fail("stale or wrong in a graph", f"replayed with {step.name}: {', '.join(wrong)}")
                first = counted if first is None else first
                if not counted or counted != first:
                    message = (
                        f"replayed with {step.name}: {counted or 'nothing'}, the first replay {first or 'nothing'}"
                    )
                    return self.fail("launches not in the ledger", message)
        return None

    def control(self, bench: Bench) -> Control:
        """A graph that looks at the step of its capture, whatever it is replayed with."""
        found: list[Control] = []
        steps, size = replayed_steps(0), bench.backend.kv_block_size()

        def stale(graph: Graph, example: Step) -> Replay:
            def replay(step: Step) -> SampleOutput:
                return graph.replay(bench.begin_step(steps[0].inputs(size), step.state))

            return replay

        def uncounted(graph: Graph, example: Step) -> Replay:
            def replay(step: Step) -> SampleOutput:
                with bench.backend.ledger.capture():
                    return graph.replay(step)

            return replay

        for spoil in (stale, uncounted):
            found.append("did not fail" if self._compare(bench, 0, spoil) is None else "failed as it must")
        return all_of(*found)


class AdapterCost(ModelCheck):
    """A replay with adapters launches at most as many kernels more as the planned implementations declare; loading
    twenty adapters captures nothing anew; a step without adapters costs the same whether any is loaded or not."""

    name = "graph.adapter_cost"

    def unavailable(self, bench: Bench) -> str:
        return "; ".join(bench.backend.graph_refusals())

    def ask(self, bench: Bench, seed: int) -> Failure | None:
        return self._launches(bench, seed, spoilt=False) or self._swaps(bench, seed, recapture=False)

    def _launches(self, bench: Bench, seed: int, spoilt: bool) -> Failure | None:
        """``spoilt``: steps with adapters run again and again, until they launch more than is declared."""
        model, plain = MiniModel(bench, seed), MiniModel(bench, seed, adapters=False)
        allowed, repeats = _declared_extra(bench, model), 0
        size = bench.backend.kv_block_size()
        busy = replayed_steps(100 * seed)[4].inputs(size)
        idle = DecodeStep(name="no adapters", seed=100 * seed, adapters={}).inputs(size)

        def forward(step: Step) -> SampleOutput:
            output = model.forward(step)
            for _ in range(repeats):
                output = model.forward(step)
            return output

        costs: dict[str, int] = {}
        for name, own, key, inputs in (
            ("none", model, WITHOUT, idle),
            ("nothing loaded", plain, WITHOUT, idle),
            ("adapters", model, WITH_ADAPTERS, busy),
        ):
            if spoilt and name == "adapters":
                repeats = 1 + allowed // max(1, costs["none"])
            fn = forward if name == "adapters" else own.forward
            step = own.begin(inputs)
            graph = bench.backend.capture(key, fn, step)
            try:
                graph.replay(step)
                bench.synchronize()
                costs[name] = _cost(bench, lambda graph=graph, step=step: graph.replay(step))  # type: ignore[misc]
            finally:
                graph.close()
        more = costs["adapters"] - costs["none"]
        if more > allowed:
            return self.fail(
                "adapters launch more than declared", f"{more} launches more with adapters, {allowed} declared"
            )
        if costs["none"] != costs["nothing loaded"]:
            return self.fail(
                "base rows cause adapter work",
                f"{costs['none']} launches for a step without adapters, {costs['nothing loaded']} with none loaded",
            )
        return None

    def _swaps(self, bench: Bench, seed: int, recapture: bool) -> Failure | None:
        model, eager = MiniModel(bench, seed), MiniModel(bench, seed)
        size = bench.backend.kv_block_size()
        step = replayed_steps(100 * seed)[4]
        example = model.begin(step.inputs(size))
        with _captured(bench, WITH_ADAPTERS, model, example) as graph:
            forwards = model.forwards
            for version in range(1, SWAPS + 1):
                for own in (model, eager):
                    own.load(version % 2, version).synchronize()
                if recapture:
                    bench.backend.capture(WITH_ADAPTERS, model.forward, example).close()
                got = model.observe(graph.replay(model.begin(step.inputs(size))))
                if model.forwards != forwards:
                    return self.fail(
                        "captured again", f"{model.forwards - forwards} captures after {version} adapters were loaded"
                    )
                if version in (1, 2, SWAPS):
                    wanted = eager.observe(eager.forward(eager.begin(step.inputs(size))))
                    wrong = [name for name, bits in wanted.items() if not np.array_equal(bits, got[name])]
                    if wrong:
                        return self.fail("stale adapters in a graph", f"after {version} loads: {', '.join(wrong)}")
        return None

    def control(self, bench: Bench) -> Control:
        """More launches than declared must be noticed, and so must a capture after each load."""
        more, anew = self._launches(bench, 0, spoilt=True), self._swaps(bench, 0, recapture=True)
        return all_of(*("did not fail" if found is None else "failed as it must" for found in (more, anew)))


@contextmanager
def _captured(bench: Bench, key: GraphKey, model: MiniModel, example: Step) -> Iterator[Graph]:
    graph = bench.backend.capture(key, model.forward, example)
    try:
        yield graph
    finally:
        graph.close()


def _cost(bench: Bench, replay: Callable[[], object]) -> int:
    """Launches of a replay: what the device did, or where nobody can see that, what the ledger says."""
    tools = instruments(bench)
    if not tools.lacks("activity"):
        with tools.recording() as recorded:
            replay()
        return recorded.count("kernel")
    before = bench.backend.ledger.launches
    replay()
    bench.synchronize()
    return bench.backend.ledger.launches - before


def _declared_extra(bench: Bench, model: MiniModel) -> int:
    """Launches that adapters may add in one decode step: at each site, the kernels declared by what is planned with
    adapters, beyond one launch of each implementation that is planned without."""
    total = 0
    for site in model.plan.sites.values():
        without, having = site.planned[0], site.planned[1]
        total += sum(_declared(bench, part) for part in _parts(having)) - len(_parts(without))
    return max(total, 0)


def _parts(planned: Planned) -> list[Planned]:
    return [inner for part in planned.parts for inner in _parts(part)] if planned.parts else [planned]


def _declared(bench: Bench, planned: Planned) -> int:
    for entry in bench.backend.table().get(planned.operator, ()):
        if planned.implementation == (entry.name or f"{bench.backend.name}.{planned.operator}"):
            kernels = [name for name in entry.evidence if "::" not in name]
            # An operator of torch may be a kernel, or several; the ledger counts the whole call once.
            seen = entry.evidence if not instruments(bench).lacks("activity") else kernels
            return max(len(seen), 1)
    return 1


GRAPH_CHECKS: Mapping[str, Check] = {check.name: check for check in (GraphReplay(), AdapterCost())}
