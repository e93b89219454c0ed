"""Implementations of sampling, emulated on single rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from polyaccel_conformance.oracle.sampling import Row
from polyaccel_conformance.problem import Problem
from tests.conformance.emulation import f32

Floats = npt.NDArray[np.float64]
Round = Callable[[npt.ArrayLike], Floats]


def adjusted(row: Row, to: Round, reciprocal: bool) -> Floats:
    scores = np.where(np.isfinite(row.logits), row.logits, -np.inf)
    if row.repetition_penalty != 1.0:
        penalty, inverse = row.repetition_penalty, to(1 / row.repetition_penalty)
        lower = to(scores * inverse) if reciprocal else to(scores / penalty)
        scores = np.where(row.seen, np.where(scores > 0, lower, to(scores * penalty)), scores)
    scores = to(scores - row.presence_penalty * (row.counts > 0))
    scores = to(scores - to(row.frequency_penalty * row.counts))
    return np.where(row.allowed, to(scores + row.bias), -np.inf)


def running(mass: Floats, to: Round, blocks: int) -> Floats:
    """Running sums, each block of its own and then shifted."""
    sums = np.zeros(len(mass))
    total = 0.0
    for begin in range(0, len(mass), blocks):
        inner = 0.0
        for i in range(begin, min(begin + blocks, len(mass))):
            inner = float(to(inner + mass[i]))
            sums[i] = to(total + inner)
        total = float(to(total + inner))
    return sums


def emulated_id(
    row: Row, uniform: float, *, to: Round = f32, reciprocal: bool = False, normal: bool = False, blocks: int = 10**9
) -> int:
    """``normal``: probabilities instead of relative masses, the temperature first; ``reciprocal``: of penalties and
    temperature."""
    scores = adjusted(row, to, reciprocal)
    if row.temperature == 0.0:
        return int(np.argmax(scores))
    divided = to(scores * to(1 / row.temperature)) if reciprocal else to(scores / row.temperature)
    top = scores.max()
    shifted = to(divided - divided.max()) if normal or reciprocal else to(to(scores - top) / row.temperature)
    mass = to(np.exp(shifted))
    if normal:
        mass = to(mass / running(mass, to, blocks)[-1])
    order = np.argsort(-scores, kind="stable")
    if row.top_k:
        mass[order[row.top_k :]] = 0.0
    if row.top_p < 1.0:
        falling = mass[order]
        sums = running(falling, to, blocks)
        before = np.concatenate(([0.0], sums[:-1]))
        inside = before < to(row.top_p * sums[-1])
        inside[0] = True
        mass[order[~inside]] = 0.0
    mass = np.where(mass >= to(row.min_p * mass.max()), mass, 0.0)
    ends = running(mass, to, blocks)
    return int(min((ends <= to(uniform * ends[-1])).sum(), np.flatnonzero(mass)[-1]))


def emulated_logprobs(row: Row, to: Round, form: str) -> Floats:
    scores = adjusted(row, to, reciprocal=form == "reciprocals")
    top = scores.max()
    mass = to(np.exp(to(scores - top)))
    if form == "pairwise":
        parts = mass
        while len(parts) > 1:
            parts = np.concatenate([parts, np.zeros(len(parts) % 2)])
            parts = to(parts[0::2] + parts[1::2])
        total = parts[0]
    else:
        total = running(mass, to, 16 if form == "blocks" else 10**9)[-1]
    logarithm = to(np.log(total))
    return to(scores - to(top + logarithm)) if form == "added back" else to(to(scores - top) - logarithm)


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """One implementation of ids and log-probabilities; ``form`` of the latter."""

    to: Round = f32
    reciprocal: bool = False
    normal: bool = False
    blocks: int = 10**9
    form: str = "sequential"

    def choose(self, row: Row, uniform: float) -> int:
        return emulated_id(row, uniform, to=self.to, reciprocal=self.reciprocal, normal=self.normal, blocks=self.blocks)

    def logprobs(self, row: Row) -> Floats:
        return emulated_logprobs(row, self.to, self.form)

    def __call__(self, problem: Problem) -> Mapping[str, Floats]:
        raise NotImplementedError("judged row by row")


SAMPLERS: Mapping[str, Sampler] = {
    "sequential": Sampler(),
    "blocks of 16": Sampler(blocks=16, form="blocks"),
    "pairwise": Sampler(form="pairwise"),
    "probabilities": Sampler(normal=True, form="added back"),
    "reciprocals": Sampler(reciprocal=True, blocks=8, form="reciprocals"),
}
