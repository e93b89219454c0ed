"""``sample.generator``: draws by the core's generator follow the distribution that is asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from polyaccel.backend import DeviceState, SampleOutput, SamplingRow, SamplingSpec
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Case, Choice
from polyaccel_conformance.device_check import DeviceCheck, DeviceProblem, Facts
from polyaccel_conformance.formats import FORMATS, to_torch
from polyaccel_conformance.problem import Prepared, Problem
from polyaccel_conformance.problems.steps import build_step

DRAWS = 100_000
ROWS = 1000
SIGNIFICANCE = 1e-6
"""Share of right generators and samplers that are called wrong."""
CATEGORIES = 17

Floats = npt.NDArray[np.float64]


class GeneratorProblem(DeviceProblem):
    """One chi-square of 100,000 draws: of one seed at many positions, of many seeds, or of a request's choices."""

    def drive(self, bench: Bench, facts: Facts) -> None:
        uniforms = self._uniforms()
        logits = FORMATS["float32"].round(self.source.normal("logits", (CATEGORIES,)))
        spec = SamplingSpec(request_slots=ROWS, vocabulary=CATEGORIES)
        state = bench.backend.allocate_sampling(spec, bench.device)
        for slot in range(ROWS):
            state.write(slot, SamplingRow(temperature=1.0))
        rows = bench.upload(to_torch(np.broadcast_to(logits, (ROWS, CATEGORIES)), "float32"))
        prepared = Prepared(arguments={}, collect=lambda result, _: {}, static={"vocabulary": CATEGORIES})
        call = bench.resolve("sample", prepared).call
        counts = np.zeros(CATEGORIES, dtype=np.int64)
        for part in uniforms.reshape(-1, ROWS):
            inputs = build_step(self.source, [1] * ROWS, uniforms=part)
            result = call(rows, state, bench.begin_step(inputs, DeviceState(sampling=state)))
            bench.synchronize()
            assert isinstance(result, SampleOutput)
            counts += torch.bincount(result.ids.cpu(), minlength=CATEGORIES).numpy()
        mass = np.exp(logits - logits.max())
        p = chi_square(counts, mass / mass.sum())
        facts.check("the draws follow the distribution", p >= SIGNIFICANCE, f"p = {p:.3g} of counts {counts.tolist()}")

    def _uniforms(self) -> Floats:
        from polyaccel_conformance.models.generator import core_uniforms

        draws = np.arange(DRAWS)
        zero = np.zeros(1, dtype=np.uint64)
        by = self.case.structure["by"]
        seeds = draws.astype(np.uint64) if by == "seeds" else zero
        choices = draws if by == "choices" else np.zeros(1, dtype=np.int64)
        positions = draws if by == "positions" else np.zeros(1, dtype=np.int64)
        drawn: Floats = np.broadcast_to(core_uniforms(seeds, choices, positions), (DRAWS,))
        # A generator that misses the top of the interval.
        return drawn * 0.96 if self.sabotaged else drawn


def chi_square(counts: npt.NDArray[np.int64], shares: Floats) -> float:
    """Probability of a statistic at least as large as this one. The number of categories is odd, for which the upper
    tail is a finite sum (Abramowitz and Stegun, 26.4.5).

    Raises:
        ValueError: an even number of categories.
    """
    if len(counts) % 2 == 0:
        raise ValueError(f"{len(counts)} categories; an odd number is needed")
    expected = shares * counts.sum()
    half = float(((counts - expected) ** 2 / expected).sum()) / 2
    terms = [half**i / math.factorial(i) for i in range((len(counts) - 1) // 2)]
    return math.exp(-half) * math.fsum(terms)


class Generator(DeviceCheck):
    """The three parts of the generator's counter and key."""

    operator = "sample.generator"
    weight = 50
    levels = ("L2",)

    def axes(self) -> Mapping[str, Sequence[Choice]]:
        return {"dtype": ("float32",), "structure.by": ("positions", "seeds", "choices")}

    def problem(self, case: Case) -> Problem:
        return GeneratorProblem(case)
