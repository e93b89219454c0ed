"""Whole-model questions as cases, logged and replayed like any operator's. The engine is imported when one runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from polyaccel.backend import Backend
from polyaccel_conformance.bench import FOLDER, Bench
from polyaccel_conformance.case import Case, Choice
from polyaccel_conformance.check import Level
from polyaccel_conformance.device_check import DeviceCheck, DeviceProblem, DeviceQuestion, Facts
from polyaccel_conformance.harness.isolation import starter_of
from polyaccel_conformance.problem import Problem
from polyaccel_conformance.workers.process import Spawn

if TYPE_CHECKING:
    from polyaccel_conformance.models.answers import Agreement
    from polyaccel_conformance.models.engines import Workshop

FAMILIES = ("llama", "qwen3", "mixtral")
WORLDS = (2, 4)


class ModelProblem(DeviceProblem):
    """One small model, run in the two ways that the question compares."""

    def drive(self, bench: Bench, facts: Facts) -> None:
        from polyaccel_conformance.models.variations import NotExercised

        try:
            found = self._ask(bench)
        except NotExercised as error:
            facts.notes.append(str(error))
            return
        facts.check(self.case.operator, found.wrong is None, found.wrong or "")

    def _ask(self, bench: Bench) -> Agreement:
        from polyaccel_conformance.models.planted import CONTROLS, PLANTED
        from polyaccel_conformance.models.variations import VARIATIONS

        name, family = self.case.operator, str(self.case.attributes["family"])
        shop, vary = workshop(bench), VARIATIONS[name]
        found = vary(shop, family, opener(bench))
        if not self.sabotaged:
            return found
        # The reference's answers are known by now and stay right.
        with PLANTED[CONTROLS[name]]():
            return vary(shop, family, opener(bench))


class EqualityProblem(ModelProblem):
    """Float32 in every setting of the engine."""

    def _ask(self, bench: Bench) -> Agreement:
        from polyaccel_conformance.models.planted_layers import LOGITS, PLANTED_LAYERS

        return self._compare(bench, opener(bench), PLANTED_LAYERS[LOGITS])

    def _compare(
        self, bench: Bench, subject: Callable[[], Backend | str], control: Callable[[], AbstractContextManager[None]]
    ) -> Agreement:
        from polyaccel_conformance.models.equality import MIXES, Settings, equality

        shop, chosen = workshop(bench), Settings.of(self.case)
        family = str(self.case.attributes["family"])
        for mixes in chosen.asked:
            shop.rounding(family, MIXES[mixes])
        # The reference's answers are known by now and stay right.
        with control() if self.sabotaged else nullcontext():
            return equality(shop, family, subject, chosen)


class RanksProblem(EqualityProblem):
    """Tensor parallelism. Workers find the backend by its name, so that it must be installed."""

    def _ask(self, bench: Bench) -> Agreement:
        from polyaccel_conformance.models.forked_ranks import forked_ranks
        from polyaccel_conformance.models.variations import NotExercised, wrong_adapter

        subject, world = bench.subject, self.case.attributes["world"]
        assert isinstance(world, int)
        if subject is None or not subject.by_name:
            raise NotExercised("the engine's workers find a backend by its entry point only")
        if bench.device.torch_device.type != "cpu" and len(bench.backend.devices()) < world:
            raise NotExercised(f"{len(bench.backend.devices())} devices for {world} ranks")
        name, starter = subject.name, starter_of(bench, preload=())
        with nullcontext() if isinstance(starter, Spawn) else forked_ranks(starter):
            return self._compare(bench, lambda: name, wrong_adapter)


class ModelQuestion(DeviceCheck):
    """A question asked of every family."""

    levels: ClassVar[tuple[Level, ...]] = ("L2", "L3")
    kind: type[ModelProblem] = ModelProblem
    weight = 200

    def __init__(self, name: str, *, families: Sequence[str] = FAMILIES) -> None:
        self.operator = name
        self._families = tuple(families)

    def axes(self) -> Mapping[str, Sequence[Choice]]:
        return {"attributes.family": self._families}

    def problem(self, case: Case) -> Problem:
        return self.kind(case)


class EqualityQuestion(ModelQuestion):
    """A question asked in every setting of the engine."""

    kind: type[ModelProblem] = EqualityProblem

    def axes(self) -> Mapping[str, Sequence[Choice]]:
        return {
            **super().axes(),
            # The first has adapters, since that is where ranks differ most.
            "attributes.adapters": ("many", "one", "none"),
            "attributes.graphs": (False, True),
            "attributes.overlap": (False, True),
            "attributes.crowd": ("alone", "crowded"),
            "attributes.prefix_cache": (False, True),
        }


class RanksQuestion(EqualityQuestion):
    """The same at each world size."""

    levels: ClassVar[tuple[Level, ...]] = ("L6",)
    kind: type[ModelProblem] = RanksProblem

    def axes(self) -> Mapping[str, Sequence[Choice]]:
        return {**super().axes(), "attributes.adapters": ("loaded", "none"), "attributes.world": WORLDS}


QUESTIONS: tuple[ModelQuestion, ...] = (
    ModelQuestion("model.tokens"),
    ModelQuestion("model.adapters"),
    ModelQuestion("model.crowd"),
    ModelQuestion("model.overlap"),
    ModelQuestion("model.chunks"),
    ModelQuestion("model.prefix_cache"),
    ModelQuestion("model.preemption"),
    ModelQuestion("model.graphs"),
    EqualityQuestion("model.float32"),
    RanksQuestion("model.ranks"),
)

MODEL_CHECKS: Mapping[str, DeviceQuestion] = {question.operator: DeviceQuestion(question) for question in QUESTIONS}


def workshop(bench: Bench) -> Workshop:
    """The small models of this process."""
    from polyaccel_conformance.models.engines import Workshop

    shop = bench.memo.get("workshop")
    if not isinstance(shop, Workshop):
        folder = bench.memo.get(FOLDER)
        shop = bench.memo["workshop"] = Workshop(kept=folder if isinstance(folder, Path) else None)
    return shop


def opener(bench: Bench) -> Callable[[], Backend]:
    """New instances of the backend on the bench: an engine closes its own."""
    if bench.subject is not None:
        return bench.subject.open
    return type(bench.backend)
