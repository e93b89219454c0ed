"""A value in float64 together with a bound of how far a right implementation's may be from it.

Running error analysis: every primitive takes such pairs and returns one, for the coarsest arithmetic that the contract
permits. A composite operator's tolerance then follows from its definition and holds no number of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from polyaccel_conformance.formats import Format

Floats = npt.NDArray[np.float64]

FALSE_ALARM = 1e-9
"""Probability that any output of a right implementation exceeds a probabilistic bound."""


def deviations(outputs: int) -> float:
    """Two-sided normal quantile such that none of ``outputs`` exceeds it, up to the false alarm rate."""
    return math.sqrt(2 * math.log(2 * max(outputs, 1) / FALSE_ALARM))


@dataclass(frozen=True, slots=True, eq=False)
class Noise:
    """The part of an error that is random: independent between elements, of mean zero.

    Attributes:
        bound: its share of the elementwise bound.
        scale: P(|error| > t) <= 2 exp(-t^2 / (2 scale^2)). An error within +-c has scale c (Hoeffding 1963).
    """

    bound: Floats
    scale: Floats

    def map(self, function: Callable[[Floats], Floats]) -> Noise:
        return Noise(function(self.bound), function(self.scale))


@dataclass(frozen=True, slots=True, eq=False)
class Bounded:
    """``value`` and ``bound`` (>= 0, of the same shape): |right implementation - value| <= bound, elementwise.

    ``terms`` name what the bound is made of, largest contributors of a failure are reported by them; they sum to the
    bound. ``noise`` is the part of it that partly cancels where elements are summed, None where nothing does.
    """

    value: Floats
    bound: Floats
    terms: tuple[tuple[str, Floats], ...] = ()
    noise: Noise | None = None

    @classmethod
    def exact(cls, value: npt.ArrayLike) -> Bounded:
        """Operands are exact: they are taken as stored."""
        value = np.asarray(value, dtype=np.float64)
        return cls(value, np.zeros_like(value))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    @property
    def magnitude(self) -> Floats:
        """The largest that |implementation's value| may be."""
        return np.abs(self.value) + self.bound

    def plus(self, name: str, extra: Floats, scale: Floats | None = None) -> Bounded:
        """The same value with a further contribution to the bound; ``scale`` where it is noise (:class:`Noise`)."""
        extra = _spread(extra, self.value)
        noise = self.noise
        if scale is not None:
            scale = _spread(scale, self.value)
            known = noise
            noise = Noise(extra, scale) if known is None else Noise(known.bound + extra, np.hypot(known.scale, scale))
        return Bounded(self.value, self.bound + extra, (*self.terms, (name, extra)), noise)

    def at(self, value: Floats) -> Bounded:
        """The same bound around another value."""
        return replace(self, value=value)

    def map(self, function: Callable[[Floats], Floats]) -> Bounded:
        """Views and rearrangements: applied to value, bound and terms alike (reshape, transpose, index)."""
        terms = tuple((n, function(t)) for n, t in self.terms)
        noise = None if self.noise is None else self.noise.map(function)
        return Bounded(function(self.value), function(self.bound), terms, noise)

    def reshape(self, *shape: int) -> Bounded:
        return self.map(lambda x: x.reshape(shape))

    def __getitem__(self, index: Any) -> Bounded:
        return self.map(lambda x: x[index])

    def __neg__(self) -> Bounded:
        return replace(self, value=-self.value)


def _spread(x: Floats, like: Floats) -> Floats:
    """``x`` in the shape of ``like``, which most are."""
    return x if np.shape(x) == like.shape else np.broadcast_to(x, like.shape)


def coarser(a: Bounded, b: Bounded) -> Bounded:
    """Elementwise the looser of two bounds of the same value: both forms are permitted."""
    looser = b.bound > a.bound
    terms = [(name, np.where(looser, 0.0, term)) for name, term in a.terms]
    terms += [(name, np.where(looser, term, 0.0)) for name, term in b.terms]
    return Bounded(a.value, np.maximum(a.bound, b.bound), tuple(terms))


def concatenate(parts: list[Bounded], axis: int = -1) -> Bounded:
    """Joined along an axis; the terms are merged into one name each."""
    value = np.concatenate([p.value for p in parts], axis)
    names = dict.fromkeys(name for p in parts for name, _ in p.terms)
    terms = tuple((name, np.concatenate([sum_of(p, name) for p in parts], axis)) for name in names)
    noise = None
    if any(p.noise is not None for p in parts):
        known = [Noise(np.zeros_like(p.value), np.zeros_like(p.value)) if p.noise is None else p.noise for p in parts]
        noise = Noise(np.concatenate([n.bound for n in known], axis), np.concatenate([n.scale for n in known], axis))
    return Bounded(value, np.concatenate([p.bound for p in parts], axis), terms, noise)


def sum_of(b: Bounded, name: str) -> Floats:
    """All of a bound's terms of one name."""
    total = np.zeros_like(b.value)
    for known, term in b.terms:
        if known == name:
            total = total + term
    return total


def cast(b: Bounded, to: Format, name: str = "rounding") -> Bounded:
    """An intermediate result that may be kept in ``to``: at most one rounding."""
    extra = to.unit * b.magnitude + 0.5 * to.smallest
    return b.plus(f"{name} to {to.name}", extra, extra)


@dataclass(frozen=True, slots=True, eq=False)
class Expected:
    """What an output must be: ``value`` before the last rounding, and the tolerance after it.

    Attributes:
        value: float64.
        tolerance: elementwise; zero where bitwise equality with the rounded value is asked for.
        format: of the output.
        exact: the value is to be rounded once and compared bit by bit (zeros of either sign are equal).
        terms: what the tolerance is made of.
    """

    value: Floats
    tolerance: Floats
    format: Format
    exact: bool
    terms: tuple[tuple[str, Floats], ...]


def finish(b: Bounded, out: Format, *, exact: bool = False) -> Expected:
    """The output rounding: ``u |r| (1 + 2^-6)`` and half the smallest number, on top of the bound."""
    if exact:
        return Expected(out.round(b.value), np.zeros_like(b.value), out, True, ())
    rounding = out.unit * np.abs(b.value) * (1 + 2.0**-6) + 0.5 * out.smallest
    # An error before the last rounding is itself rounded with the result.
    tolerance = rounding + b.bound * (1 + 2 * out.unit)
    known = np.isfinite(b.value)
    if not known.all():
        tolerance = np.where(known, tolerance, 0.0)
    return Expected(b.value, tolerance, out, False, (("output rounding", rounding), *b.terms))
