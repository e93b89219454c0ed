"""Problems of several ranks: each rank has its own operands, and all know what every rank must end with."""

from __future__ import annotations

import math
import time
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import numpy.typing as npt
import torch

from polyaccel.backend import Collective
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Case
from polyaccel_conformance.formats import FORMATS, Format, format_of
from polyaccel_conformance.oracle.bounded import Bounded
from polyaccel_conformance.problem import Outputs, Prepared, Problem

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Traced:
    """What the core saw this rank send in one call.

    ``expected``: the collectives that the contract allows; ``riding``: bytes by which rank rows may lengthen each of
    them where they ride along.
    """

    seen: tuple[Collective, ...]
    expected: tuple[Collective, ...]
    riding: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """Weight bytes: ``held`` by this rank's weights as the backend says, ``whole`` of the values of the uncut weights,
    ``replicated`` of what a rank may hold in full."""

    held: int
    whole: int
    replicated: int = 0


class RankedProblem(Problem):
    """One rank's view of a case. Built alike on all ranks; :meth:`on_rank` chooses.

    Attributes:
        rank, world_size: of this view.
        replicated: outputs that must have the same bits on every rank.
        only: the one check that may be asked, where the case is meant to fail and nothing works after it.
        traced: what the last call sent.
    """

    replicated: frozenset[str] = frozenset()
    only: str = ""

    def __init__(self, case: Case, rank: int = 0) -> None:
        super().__init__(case)
        self.rank = rank
        self.world_size = case.ranks
        self.traced: Traced | None = None

    @property
    def evenly_cut(self) -> bool:
        """Whether weights are cut into equal parts whose sizes no backend needs to pad."""
        return bool(self.case.structure.get("even"))

    def on_rank(self, rank: int) -> Self:
        """The same case as another rank sees it."""
        return type(self)(self.case, rank)

    @abstractmethod
    def place(self, bench: Bench) -> Prepared:
        """As :meth:`Problem.prepare`, of this rank's share."""

    def collectives(self, prepared: Prepared) -> tuple[Collective, ...]:
        """The collectives of one call as the contract specifies them, by this rank's bytes."""
        return ()

    def riding(self) -> int:
        """Bytes of rank rows that may ride along with a collective."""
        return 0

    def shares(self, bench: Bench) -> Shares:
        """What this rank's weights take, against the whole. Only where :attr:`evenly_cut`."""
        raise NotImplementedError(f"{type(self).__name__} cuts no weight")

    def delay(self) -> None:
        """Wait as long as the case makes this rank late."""
        if self.case.skew:
            time.sleep(self.case.skew[self.rank % len(self.case.skew)] / 1000)

    def prepare(self, bench: Bench) -> Prepared:
        """Place this rank's share, wait as long as the case delays this rank, and watch what the call sends."""
        prepared = self.place(bench)
        expected, riding = self.collectives(prepared), self.riding()
        self.delay()
        seen: list[Collective] = []
        bench.comm.trace = seen
        collect = prepared.collect

        def watched(result: object, tensors: Mapping[str, torch.Tensor]) -> Outputs:
            bench.comm.trace = None
            self.traced = Traced(seen=tuple(seen), expected=expected, riding=riding)
            return collect(result, tensors)

        return replace(prepared, collect=watched)


def digests_of_ranks(problem: RankedProblem) -> dict[str, str]:
    """The digests of every rank's inputs, by name and rank, as a result of several ranks has them."""
    views = [problem.on_rank(rank) for rank in range(problem.world_size)]
    return {f"{name}@{view.rank}": digest for view in views for name, digest in view.digests().items()}


# -- data whose sums name their contributors ---------------------------------------------------------------------------


def radix(dtype: str, world_size: int, reserve: int = 0) -> int:
    """The base in which each rank has a digit of its own, such that a sum of all digits is exact in ``dtype`` in any
    order. ``reserve``: bits left for what happens to the sum."""
    bits = (FORMATS[dtype].bits - reserve) // world_size
    # Six bits a rank tell float32 sums from those in any narrower format; more would only shorten nothing.
    return int(2 ** max(min(bits, 6), 1))


def digits(problem: RankedProblem, name: str, shape: tuple[int, ...], rank: int, reserve: int = 0) -> Ints:
    """What ``rank`` contributes: ``base^rank`` times a digit of 1..base-1, signed alike on all ranks.

    A missing, doubled or foreign contribution changes the digit of the rank it belongs to.
    """
    base = radix(problem.case.dtype, problem.world_size, reserve)
    code = problem.source.integers(f"{name} {rank}", shape, 1, max(base - 1, 1))
    sign = 1 - 2 * problem.source.integers(f"{name} sign", shape, 0, 1)
    contribution: Ints = code * sign * base**rank
    return contribution


def place_value(dtype: str, world_size: int, rank: int) -> int:
    """What a rank's digit counts. Worlds too large for a digit each share two, which stays exact up to 8 ranks."""
    base = radix(dtype, world_size)
    return int(base**rank if base >= 4 else 4 ** (rank % 2))


def summed(parts: list[Bounded], out: Format, *, last: bool = False) -> Bounded:
    """Sum over ranks, in any order and kept in ``out`` between additions: ``(W - 1) u sum |x_i|``.

    ``last``: the sum is the result itself, so that its final rounding is the output's own.
    """
    value = np.sum([part.value for part in parts], axis=0)
    carried = np.sum([part.bound for part in parts], axis=0)
    magnitudes = np.sum([part.magnitude for part in parts], axis=0)
    steps = max(len(parts) - 1 - last, 0)
    total = Bounded(value, np.zeros_like(value))
    if np.any(carried):
        total = total.plus("error of the ranks' parts", carried)
    return total.plus("sum over ranks", steps * (out.unit * magnitudes + 0.5 * out.smallest))


def cut(n: int, world_size: int, rank: int) -> tuple[int, int]:
    """First and last row of a rank's part of ``n``: parts differ by one at most, larger ones first."""
    each, extra = divmod(n, world_size)
    begin = rank * each + min(rank, extra)
    return begin, begin + each + (rank < extra)


def nbytes(shape: tuple[int, ...], dtype: str) -> int:
    """Bytes of a tensor."""
    return math.prod(shape) * format_of(dtype).torch.itemsize
