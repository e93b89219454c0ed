"""A value in float64 together with a bound of how far a right implementation's may be from it.

Running error analysis: every primitive takes such pairs and returns one, for the coarsest arithmetic that the contract
permits. A composite operator's tolerance then follows from its definition and holds no number of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from polyaccel_conformance.formats import Format

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Bounded:
    """``value`` and ``bound`` (>= 0, of the same shape): |right implementation - value| <= bound, elementwise.

    ``terms`` name what the bound is made of, largest contributors of a failure are reported by them; they sum to the
    bound.
    """

    value: Floats
    bound: Floats
    terms: tuple[tuple[str, Floats], ...] = ()

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

    def plus(self, name: str, extra: Floats) -> Bounded:
        """The same value with a further contribution to the bound."""
        extra = np.broadcast_to(extra, self.value.shape)
        return Bounded(self.value, self.bound + extra, (*self.terms, (name, extra)))

    def map(self, function: Callable[[Floats], Floats]) -> Bounded:
        """Views and rearrangements: applied to value, bound and terms alike (reshape, transpose, index)."""
        return Bounded(function(self.value), function(self.bound), tuple((n, function(t)) for n, t in self.terms))

    def reshape(self, *shape: int) -> Bounded:
        return self.map(lambda x: x.reshape(shape))

    def __getitem__(self, index: Any) -> Bounded:
        return self.map(lambda x: x[index])

    def __neg__(self) -> Bounded:
        return Bounded(-self.value, self.bound, self.terms)


def concatenate(parts: list[Bounded], axis: int = -1) -> Bounded:
    """Joined along an axis; the terms are merged into one name each."""
    value = np.concatenate([p.value for p in parts], axis)
    names = dict.fromkeys(name for p in parts for name, _ in p.terms)
    terms = tuple((name, np.concatenate([sum_of(p, name) for p in parts], axis)) for name in names)
    return Bounded(value, np.concatenate([p.bound for p in parts], axis), terms)


def sum_of(b: Bounded, name: str) -> Floats:
    """All of a bound's terms of one name."""
    total = np.zeros_like(b.value)
    for known, term in b.terms:
        if known == name:
            total = total + term
    return total


def cast(b: Bounded, to: Format, name: str = "rounding") -> Bounded:
    """An intermediate result that may be kept in ``to``: at most one rounding."""
    return b.plus(f"{name} to {to.name}", to.unit * b.magnitude + 0.5 * to.smallest)


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
    carried = b.bound * (1 + 2 * out.unit)
    return Expected(b.value, rounding + carried, out, False, (("output rounding", rounding), *b.terms))
