"""Which ids ``sample`` may return, and their log-probabilities, in float64 with bounds.

Filters in the contract's order: penalties (repetition as in CTRL, arXiv 1909.05858; presence and frequency as in
OpenAI's interface), bias, mask, temperature, top-k, top-p (nucleus, arXiv 1904.09751), min-p (arXiv 2407.01082), then
the inverse of the cumulative distribution over the kept ids in ascending order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from polyaccel_conformance.oracle.bounded import Bounded
from polyaccel_conformance.oracle.functions import SMALLEST_NORMAL
from polyaccel_conformance.oracle.primitives import ACCUMULATOR

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

EXP_ULPS = 2
LOG_ULPS = 2
NOTHING = 2.0**-152
"""Masses below this are zero in float32, however they are rounded."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Row:
    """One row of ``sample`` as the contract defines it; float parameters are representable in float32.

    Attributes:
        logits: ``[vocabulary]``; NaN and minus infinity are no candidates.
        seen: ``[vocabulary]`` ids of the prompt or the output; ``counts``: how often each was output.
        bias: ``[vocabulary]``; ``allowed``: ``[vocabulary]``, ids that are forbidden now excluded.
        exact: masses are 0 or 1 and thresholds dyadic, so that nothing is ever rounded.
    """

    logits: Floats
    seen: Bools
    counts: Ints
    bias: Floats
    allowed: Bools
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    exact: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Chosen:
    """What a row may return.

    Attributes:
        ids: the acceptable ones, ascending; one where the row is not ambiguous.
        clear: no filter's decision lies within the bounds. Where it is False, ``ids`` may lack an acceptable one.
    """

    ids: Ints
    clear: bool


class Distribution:
    """Adjusted scores of one row, and what follows from them."""

    def __init__(self, row: Row) -> None:
        self.row = row
        self.candidates = row.allowed & np.isfinite(row.logits)
        self.scores = _adjusted(row)

    def choose(self, uniform: float) -> Chosen:
        """The ids that a right implementation may return for ``uniform`` in [0, 1)."""
        if not self.candidates.any():
            return Chosen(ids=np.flatnonzero(self.row.allowed)[:1], clear=True)
        if self.row.temperature == 0.0:
            return self._greedy()
        kept, clear = self._kept
        ids = np.flatnonzero(kept)
        low, high, error = self._cdf
        accepted = (uniform >= low - error[0]) & (uniform <= high + error[1])
        if self.row.exact:
            accepted = (uniform >= low) & (uniform < high)
        return Chosen(ids=ids[accepted], clear=clear)

    def _greedy(self) -> Chosen:
        value, bound = self.scores.value, self.scores.bound
        best = int(np.argmax(np.where(self.candidates, value, -np.inf)))
        equal = (value == value[best]) & (bound == bound[best])
        rivals = self.candidates & (value + bound >= value[best] - bound[best]) & ~equal
        ids = np.flatnonzero(rivals)
        return Chosen(ids=np.union1d(ids, [best]), clear=not len(ids))

    # -- masses --------------------------------------------------------------------------------------------------------

    @cached_property
    def _mass(self) -> Bounded:
        """Relative to the largest, after temperature; zero where no candidate."""
        value, bound = self.scores.value, self.scores.bound
        best = int(np.argmax(np.where(self.candidates, value, -np.inf)))
        top, top_bound = value[best], bound[best]
        temperature = self.row.temperature
        x = np.where(self.candidates, value - top, -np.inf) / temperature
        # Scores may be divided by the temperature before or after the largest is subtracted.
        with np.errstate(invalid="ignore"):
            scaled = (2 * np.abs(value) + 2 * abs(top)) / temperature + np.abs(x)
        error = (bound + top_bound) / temperature + ACCUMULATOR * np.where(self.candidates, scaled, 0.0)
        mass = np.exp(x)
        relative = np.expm1(error) + 2 * ACCUMULATOR * EXP_ULPS
        # Equal scores of equal history are equal whatever is done to them.
        same = (value == top) & (bound == top_bound)
        relative = np.where(same, 0.0, relative)
        nothing = mass < NOTHING
        tiny = np.where(nothing | same, 0.0, SMALLEST_NORMAL)
        return Bounded(np.where(nothing, 0.0, mass), np.where(nothing, 0.0, mass * relative) + tiny)

    @cached_property
    def _kept(self) -> tuple[Bools, bool]:
        """Which ids pass the filters, and whether that is beyond doubt."""
        row, mass = self.row, self._mass
        order = np.argsort(np.where(self.candidates, -self.scores.value, np.inf), kind="stable")
        order = order[: int(self.candidates.sum())]
        value, bound = mass.value[order], mass.bound[order]
        score = self.scores.value[order]
        clear = True
        if 0 < row.top_k < len(order):
            k = row.top_k
            equal = score[k - 1] == score[k] and bound[k - 1] == bound[k]
            apart = value[k - 1] - bound[k - 1] > value[k] + bound[k]
            clear &= bool(equal or apart or value[k - 1] == 0.0)
            order, value, bound = order[:k], value[:k], bound[:k]
        if row.top_p < 1.0:
            inside, sure = self._nucleus(value, bound)
            clear &= sure
            order, value, bound = order[inside], value[inside], bound[inside]
        if row.min_p > 0.0:
            threshold = row.min_p * value[0]
            doubt = bound + 4 * ACCUMULATOR * threshold
            clear &= row.exact or not bool(np.any((np.abs(value - threshold) <= doubt) & (value != value[0])))
            order = order[value >= threshold]
        kept = np.zeros(len(self.candidates), dtype=bool)
        kept[order] = True
        return kept, clear

    def _nucleus(self, value: Floats, bound: Floats) -> tuple[Bools, bool]:
        """The smallest set of the largest masses that reaches top_p of their sum; at least one."""
        ends = np.cumsum(value)
        before = np.concatenate(([0.0], ends[:-1]))
        threshold = self.row.top_p * ends[-1]
        inside = before < threshold
        inside[0] = True
        if self.row.exact:
            return inside, True
        doubt = _sum_error(value, bound)[-1] + 4 * ACCUMULATOR * threshold
        # Ties are kept or dropped one by one, in ascending order of id: their sums differ.
        return inside, not bool(np.any(np.abs(before[1:] - threshold) <= doubt))

    @cached_property
    def _cdf(self) -> tuple[Floats, Floats, tuple[Floats, Floats]]:
        """Where each kept id begins and ends in [0, 1), and by how much either may be off."""
        kept = self._kept[0]
        value, bound = self._mass.value[kept], self._mass.bound[kept]
        ends = np.cumsum(value)
        error = _sum_error(value, bound)
        total = ends[-1]
        high = ends / total
        # The target u * total is rounded, and u may have been compared with quotients.
        off = (error + high * error[-1]) / total + 4 * ACCUMULATOR * high
        low = np.concatenate(([0.0], high[:-1]))
        off_low = np.concatenate(([0.0], off[:-1]))
        high[-1] = np.inf
        return low, high, (off_low, off)

    # -- log-probabilities ---------------------------------------------------------------------------------------------

    @cached_property
    def logprobs(self) -> Bounded:
        """``[vocabulary]``: of adjusted scores, before temperature and filters; minus infinity where no candidate."""
        value, bound = self.scores.value, self.scores.bound
        top = value[self.candidates].max()
        shifted = np.where(self.candidates, value - top, -np.inf)
        error = bound + ACCUMULATOR * np.where(self.candidates, np.abs(shifted), 0.0)
        mass = np.exp(shifted)
        masses = mass * (np.expm1(error) + 2 * ACCUMULATOR * EXP_ULPS)
        total = mass.sum()
        off = float(_sum_error(mass, masses)[-1]) / total
        logarithm = np.log(total)
        # The largest may be added back to the logarithm before or after the score is taken.
        finite = np.where(self.candidates, np.abs(value), 0.0)
        rounding = ACCUMULATOR * (2 * finite + 2 * abs(top) + (2 * LOG_ULPS + 2) * logarithm)
        result = np.where(self.candidates, shifted - logarithm, -np.inf)
        return Bounded(result, np.where(self.candidates, error + off / (1 - off) + rounding, 0.0))

    def largest(self, count: int) -> tuple[Ints, Bools]:
        """The ids of the ``count`` largest adjusted scores, lowest first among equals; and which of them are certain.

        Fewer where there are fewer candidates.
        """
        order = np.argsort(np.where(self.candidates, -self.scores.value, np.inf), kind="stable")
        order = order[: int(self.candidates.sum())]
        value, bound = self.scores.value[order], self.scores.bound[order]
        apart = (value - bound)[:-1] > np.maximum.accumulate((value + bound)[::-1])[::-1][1:]
        equal = (value[:-1] == value[1:]) & (bound[:-1] == bound[1:])
        settled = np.concatenate(([True], apart | equal, [True]))
        return order[:count], (settled[:-1] & settled[1:])[:count]


def _adjusted(row: Row) -> Bounded:
    """Penalties and bias on the logits; ids that are no candidates hold anything finite."""
    value = np.where(np.isfinite(row.logits), row.logits, 0.0)
    bound = np.zeros_like(value)
    if row.repetition_penalty != 1.0:
        penalised = np.where(value > 0, value / row.repetition_penalty, value * row.repetition_penalty)
        value = np.where(row.seen, penalised, value)
        # A division may be a multiplication by the reciprocal.
        bound = np.where(row.seen, 3 * ACCUMULATOR * np.abs(value), 0.0)
    produced = row.counts > 0
    for amount in (row.presence_penalty * produced, row.frequency_penalty * row.counts, -row.bias):
        changed = amount != 0
        value = np.where(changed, value - amount, value)
        rounding = ACCUMULATOR * (np.abs(value) + np.abs(amount) + bound)
        bound = np.where(changed, bound + rounding, bound)
    return Bounded(value, bound)


def _sum_error(value: Floats, bound: Floats) -> Floats:
    """Of running sums of masses in float32, in any order."""
    count = np.arange(1, len(value) + 1)
    gamma = count * ACCUMULATOR / (1 - count * ACCUMULATOR)
    error: Floats = np.cumsum(bound) + 2 * gamma * np.cumsum(value)
    return error
