"""What loading an adapter costs, counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from polyaccel_conformance.bench import Bench
from polyaccel_conformance.check import Check, Control, Failure
from polyaccel_conformance.checks.graph import WITH_ADAPTERS, ModelCheck
from polyaccel_conformance.harness.devices import instruments
from polyaccel_conformance.harness.graphs import MiniModel, replayed_steps

FEW, MANY = 1, 12
"""Modules of the two models that are compared, beside embedding and logits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of one load: copies from host to device, collectives, captures that it caused."""

    copies: int
    collectives: int
    captures: int


class LoadCost(ModelCheck):
    """The copies to the device do not depend on the number of modules; no collective, no capture."""

    name = "lora.load_cost"

    def unavailable(self, bench: Bench) -> str:
        return instruments(bench).lacks("activity")

    def ask(self, bench: Bench, seed: int) -> Failure | None:
        return self._judge(self._measure(bench, seed, FEW), self._measure(bench, seed, MANY))

    def _judge(self, few: Cost, many: Cost) -> Failure | None:
        if few.copies != many.copies:
            return self.fail(
                "copies grow with the modules",
                f"{few.copies} copies to the device for {FEW + 2} modules, {many.copies} for {MANY + 2}",
            )
        for what, count in (("collectives", many.collectives), ("captures", many.captures)):
            if count:
                return self.fail(f"{what} during a load", f"{count} {what} for {MANY + 2} modules")
        return None

    def _measure(self, bench: Bench, seed: int, modules: int, *, one_by_one: bool = False) -> Cost:
        """``one_by_one``: with a copy for each module as well, deliberately."""
        model = MiniModel(bench, seed, modules=modules)
        graph = None
        if not bench.backend.graph_refusals():
            example = model.begin(replayed_steps(100 * seed)[0].inputs(bench.backend.kv_block_size()))
            graph = bench.backend.capture(WITH_ADAPTERS, model.forward, example)
        forwards, trace = model.forwards, bench.comm.trace
        bench.comm.trace = []
        try:
            with instruments(bench).recording() as recorded:
                if one_by_one:
                    packed = model.packed(1, 1)
                    for entry in packed.entries:
                        bench.upload(packed.a(entry))
                model.load(1, version=1).synchronize()
            collectives = len(bench.comm.trace)
        finally:
            bench.comm.trace = trace
            if graph is not None:
                graph.close()
        return Cost(copies=recorded.count("to device"), collectives=collectives, captures=model.forwards - forwards)

    def control(self, bench: Bench) -> Control:
        few, many = (self._measure(bench, 0, modules, one_by_one=True) for modules in (FEW, MANY))
        return "did not fail" if self._judge(few, many) is None else "failed as it must"


LORA_COST_CHECKS: Mapping[str, Check] = {check.name: check for check in (LoadCost(),)}
