"""What a case means: its operands, what is called, what must come out. One subclass an operator."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Self

import torch

from polyaccel.backend import OPERATORS, STATIONS, OperatorSpec, TokenClass
from polyaccel.backend.support import Static
from polyaccel_conformance.case import Case, Choice
from polyaccel_conformance.operand import Operand
from polyaccel_conformance.oracle.bounded import Expected
from polyaccel_conformance.words import Source

if TYPE_CHECKING:
    from polyaccel_conformance.bench import Bench


@dataclass(frozen=True, slots=True, kw_only=True)
class Exactly:
    """An output that is discrete: integers, or bits."""

    values: object
    """int64 array, compared for equality after conversion; or a callable ``(observed array) -> str | None`` that
    returns what is wrong, for outputs of which several are right."""
    dtype: torch.dtype | None = None
    """That the output must have; None where the contract leaves it open."""


Outputs = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A problem placed on a device.

    Attributes:
        arguments: by name in the contract, everything that is not a plain tensor: Weight, Step, KVCache, attributes.
        collect: from the call's result and the tensor arguments (by name, after the call), the outputs by name. State
            that the operator must have changed (a KV cache, counts) is read here.
        static, ranges, token_class, adapters: for the query that the plan answers.
        release: frees what was allocated, if the backend needs to be told.
        call: what is called without arguments in place of a planned operator, for what is no operator.
        again: puts back what a call may change and begins the step anew, so that the same memory serves another call;
            returns the arguments that are new. None where everything has to be placed again.
    """

    arguments: Mapping[str, object]
    collect: Callable[[object, Mapping[str, torch.Tensor]], Outputs]
    static: Mapping[str, Static] = field(default_factory=lambda: MappingProxyType({}))
    ranges: Mapping[str, tuple[int, int]] = field(default_factory=lambda: MappingProxyType({}))
    token_class: TokenClass = TokenClass.MIXED
    adapters: bool = False
    release: Callable[[], None] = lambda: None
    call: Callable[[], object] | None = None
    again: Callable[[], Mapping[str, object]] | None = None


class Problem(ABC):
    """One case made concrete. Pure host data; the same on every rank and machine.

    Attributes:
        operands: tensor arguments by name in the contract; optional ones that are absent are missing.
        exact: the data are such that a right implementation's result is determined bit by bit (tier 1).
        arithmetic: its outputs are compared with what is expected; otherwise a check of its own judges it.
    """

    operands: Mapping[str, Operand]
    exact: bool = False
    arithmetic: bool = True

    def __init__(self, case: Case) -> None:
        self.case = case
        self.source = Source(case.seed)

    @property
    def spec(self) -> OperatorSpec:
        found = OPERATORS.get(self.case.operator) or STATIONS.get(self.case.operator)
        assert found is not None
        return found

    @abstractmethod
    def prepare(self, bench: Bench) -> Prepared:
        """Allocate and fill what the call needs beside its tensors: weights, caches, adapters, the step."""

    @abstractmethod
    def expected(self) -> Mapping[str, Expected | Exactly]:
        """What each output must be. Not called before it is needed; the result is kept by the trial."""

    @property
    def apart(self) -> Sequence[int]:
        """Rows of the outputs that :meth:`alone` can give; none where rows share no step or that is not known."""
        return ()

    def alone(self, row: int) -> Problem | None:
        """The same problem with only what one row of :attr:`apart` needs, for operators whose rows share a step.

        Its outputs have that row first; outputs that have no such row are missing.
        """
        return None

    def beside(self) -> Self:
        """A copy that is given other operands, for a call beside those of this problem."""
        other = copy.copy(self)
        # A worker lets a problem look up what its own operands lead to: these are others.
        vars(other).pop("expected", None)
        return other

    def digests(self) -> dict[str, str]:
        """A hash of every input, for the case file."""
        return {name: operand.digest() for name, operand in self.operands.items()}


class ProblemSet(ABC):
    """All cases of one operator: its axes, and how a case becomes a problem.

    Axes are named by the paths of :meth:`Case.of`; every argument and attribute of the operator's spec is one. Values
    are listed from simple to special: a failing case shrinks towards the first of each.

    Attributes:
        weight: how many ordinary cases one of these takes the time of; so many fewer are drawn.
    """

    operator: str
    weight: int = 1

    @abstractmethod
    def axes(self) -> Mapping[str, Sequence[Choice]]:
        """Values of each axis in the pairwise covering list."""

    def ranges(self) -> Mapping[str, tuple[int, int]]:
        """Axes whose further examples are any integer of a range, ends included."""
        return MappingProxyType({})

    def large(self) -> Sequence[Mapping[str, Choice]]:
        """Fixed cases beyond the sizes of the axes, in every profile: the axes named here, all others at their first
        value. Each should take at most some tens of milliseconds."""
        return ()

    def mend(self, axes: dict[str, Choice]) -> dict[str, Choice] | None:
        """Make a combination of axis values a valid case by adjusting values, or None where it has no meaning. Must
        not make an axis value unreachable, and ``mend(mend(a)) == mend(a)``."""
        return axes

    def waits(self, case: Case) -> bool:
        """Whether a right implementation needs seconds for this case, such as the timeout of a rank that is absent."""
        return False

    @abstractmethod
    def problem(self, case: Case) -> Problem: ...
