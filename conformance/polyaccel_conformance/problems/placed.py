"""Problems whose copies use what was placed for them."""

from __future__ import annotations

from abc import abstractmethod
from typing import Generic, Self, TypeVar

from polyaccel_conformance.bench import Bench
from polyaccel_conformance.problem import Problem

T = TypeVar("T")


class PlacedProblem(Problem, Generic[T]):
    """A problem that places something no call may change: it serves the copies that are called beside it as well.

    A trial lends what one step needs (:meth:`~polyaccel_conformance.trial.Trial.beside`); this outlives the step, so
    that a row alone has it in a step of its own.
    """

    _placed: tuple[Bench, T] | None = None
    _lent: tuple[Bench, T] | None = None

    @abstractmethod
    def place(self, bench: Bench) -> T:
        """Put it on the device."""

    def stored(self, bench: Bench) -> T:
        """What is on the device: placed for this problem, or for the one it is a copy of."""
        if self._lent is not None and self._lent[0] is bench:
            return self._lent[1]
        found = self.place(bench)
        self._placed = bench, found
        return found

    def beside(self) -> Self:
        other = super().beside()
        other._lent = self._placed
        return other
