"""Cases of the collectives. What a rank sends differs from rank to rank."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import torch

from polyaccel.backend import Collective
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Case, Choice
from polyaccel_conformance.formats import format_of
from polyaccel_conformance.multi.problem import RankedProblem, digits, nbytes, summed
from polyaccel_conformance.operand import Operand
from polyaccel_conformance.oracle.bounded import Bounded, Expected, finish
from polyaccel_conformance.problem import Exactly, Outputs, Prepared, Problem, ProblemSet
from polyaccel_conformance.problems.weights import tensor_of

Floats = npt.NDArray[np.float64]

DIGITS = "digits"
KINDS = (DIGITS, "normal", "wide", "positive")
ROWS = (1, 0, 2, 7, 33)
WIDTHS = (1, 2, 5, 31, 64, 129)
SCENARIOS = ("plain", "back_to_back", "interleaved", "subgroups", "withheld", "failing")
"""``plain``: one call. ``back_to_back``: several on one buffer. ``interleaved``: on two communicators in turn.
``subgroups``: in groups of some of the ranks. ``withheld``: one rank stays away. ``failing``: one rank fails."""
FAILING = MappingProxyType({"withheld": "comm.timeout", "failing": "comm.failure_on_one_rank"})
"""Scenarios that leave nothing usable behind, and the check that asks about them."""
SKEWS: tuple[tuple[int, ...], ...] = ((), (3,), (0, 4), (6, 0, 0))
"""Milliseconds by which each rank is late, repeated over the ranks."""
CALLS = 3
"""Sums on one buffer in scenario ``back_to_back``."""


class CollectiveProblem(RankedProblem):
    """``x: [rows, width]`` on every rank, different on each."""

    operand = True

    def __init__(self, case: Case, rank: int = 0) -> None:
        super().__init__(case, rank)
        self.exact = not self.sums or case.data == DIGITS
        self.contributions = [self.contribution(r) for r in range(case.ranks)] if self.operand else []
        self.operands = {"x": self.contributions[rank]} if self.operand else {}

    sums = False

    def shape(self, rank: int) -> tuple[int, ...]:
        """Of what a rank sends."""
        return (self.case.dim("rows"), self.case.dim("width"))

    def contribution(self, rank: int) -> Operand:
        """What a rank sends."""
        case, shape = self.case, self.shape(rank)
        if case.data == DIGITS:
            # Repeated sums multiply by the world size each time.
            repeated = case.structure.get("scenario") == "back_to_back"
            reserve = (CALLS - 1) * int(np.ceil(np.log2(case.ranks))) if repeated else 0
            return Operand.rounded(digits(self, "x", shape, rank, reserve), case.dtype)
        values = self.source.normal(f"x {rank}", shape)
        if case.data == "positive":
            values = np.abs(values)
        elif case.data == "wide":
            # Ranks of different magnitudes, so that the order of a sum can be seen in its last bits.
            values = values * 2.0 ** self.source.integers(f"scale {rank}", shape, -4, 4)
        return Operand.rounded(values, case.dtype)

    @property
    def parts(self) -> list[Floats]:
        """Every rank's contribution."""
        return [np.asarray(part.values, dtype=np.float64) for part in self.contributions]

    def place(self, bench: Bench) -> Prepared:
        return Prepared(
            arguments={"comm": bench.comm, **self.attributes()},
            collect=self.collect,
            static={"dtype": self.case.dtype, "world_size": self.world_size, **self.static()},
        )

    def attributes(self) -> Mapping[str, object]:
        """The arguments beside x and the communicator."""
        return {}

    def static(self) -> Mapping[str, int]:
        """Attributes that are known at load."""
        return {}

    def collect(self, result: object, tensors: Mapping[str, torch.Tensor]) -> Outputs:
        return {"y": tensor_of(result)}

    def collectives(self, prepared: Prepared) -> tuple[Collective, ...]:
        return (Collective(self.case.operator, nbytes(self.shape(self.rank), self.case.dtype)),)

    @abstractmethod
    def wanted(self) -> Bounded | None:
        """The result before its rounding; None for a collective without one."""

    def expected(self) -> Mapping[str, Expected | Exactly]:
        wanted = self.wanted()
        return {} if wanted is None else {"y": finish(wanted, format_of(self.case.dtype), exact=self.exact)}

    def digests(self) -> dict[str, str]:
        return {f"x{rank}": operand.digest() for rank, operand in enumerate(self.contributions)}


class AllReduceProblem(CollectiveProblem):
    """The sum, in place, with the same bits everywhere."""

    sums = True
    replicated = frozenset({"y"})

    def __init__(self, case: Case, rank: int = 0) -> None:
        super().__init__(case, rank)
        self.only = FAILING.get(str(case.structure["scenario"]), "")

    def wanted(self) -> Bounded:
        return summed([Bounded.exact(part) for part in self.parts], format_of(self.case.dtype), last=True)

    def collect(self, result: object, tensors: Mapping[str, torch.Tensor]) -> Outputs:
        return {"y": tensor_of(result), "x": tensors["x"]}

    def expected(self) -> Mapping[str, Expected | Exactly]:
        (y,) = super().expected().values()
        return {"y": y, "x": y}


class AllGatherProblem(CollectiveProblem):
    """``x: [rows, 2, width]`` joined along any dimension."""

    replicated = frozenset({"y"})

    def shape(self, rank: int) -> tuple[int, ...]:
        return (self.case.dim("rows"), 2, self.case.dim("width"))

    def attributes(self) -> Mapping[str, object]:
        return {"dim": self.case.attributes["dim"]}

    def wanted(self) -> Bounded:
        dim = self.case.attributes["dim"]
        assert isinstance(dim, int)
        return Bounded.exact(np.concatenate(self.parts, dim))


class ReduceScatterProblem(CollectiveProblem):
    """``x: [world size * rows, width]``; each rank ends with its rows of the sum."""

    sums = True

    def shape(self, rank: int) -> tuple[int, ...]:
        return (self.case.dim("rows") * self.world_size, self.case.dim("width"))

    def wanted(self) -> Bounded:
        whole = summed([Bounded.exact(part) for part in self.parts], format_of(self.case.dtype), last=True)
        rows = self.case.dim("rows")
        return whole[self.rank * rows : (self.rank + 1) * rows]


class AllToAllProblem(CollectiveProblem):
    """Rank i sends ``counts[i, j]`` rows to rank j."""

    def __init__(self, case: Case, rank: int = 0) -> None:
        self.counts = _counts(case)
        super().__init__(case, rank)

    def shape(self, rank: int) -> tuple[int, ...]:
        return (int(self.counts[rank].sum()), self.case.dim("width"))

    def attributes(self) -> Mapping[str, object]:
        return {
            "send_rows": [int(n) for n in self.counts[self.rank]],
            "receive_rows": [int(n) for n in self.counts[:, self.rank]],
        }

    def wanted(self) -> Bounded:
        received = []
        for sender, part in enumerate(self.parts):
            begin = int(self.counts[sender, : self.rank].sum())
            received.append(part[begin : begin + int(self.counts[sender, self.rank])])
        return Bounded.exact(np.concatenate(received))


class BroadcastProblem(CollectiveProblem):
    """The source's rows in place of everybody's."""

    replicated = frozenset({"y"})

    def attributes(self) -> Mapping[str, object]:
        return {"source": self.case.attributes["source"]}

    def wanted(self) -> Bounded:
        source = self.case.attributes["source"]
        assert isinstance(source, int)
        return Bounded.exact(self.parts[source])

    def collect(self, result: object, tensors: Mapping[str, torch.Tensor]) -> Outputs:
        return {"y": tensor_of(result), "x": tensors["x"]}

    def expected(self) -> Mapping[str, Expected | Exactly]:
        (y,) = super().expected().values()
        return {"y": y, "x": y}


class BarrierProblem(CollectiveProblem):
    """Nothing is computed; :mod:`checks.comm` asks whether a late rank was waited for."""

    operand = False
    arithmetic = False

    def collect(self, result: object, tensors: Mapping[str, torch.Tensor]) -> Outputs:
        return {}

    def collectives(self, prepared: Prepared) -> tuple[Collective, ...]:
        return (Collective("barrier", 0),)

    def wanted(self) -> None:
        return None


def _counts(case: Case) -> npt.NDArray[np.int64]:
    """``[world, world]`` rows by the case's pattern."""
    world, rows = case.ranks, case.dim("rows")
    index = np.arange(world)
    pattern = case.structure["counts"]
    if pattern == "even":
        return np.full((world, world), rows, dtype=np.int64)
    if pattern == "uneven":
        counts: npt.NDArray[np.int64] = (index[:, None] * 2 + index[None, :] * 3 + case.seed) % (rows + 2)
        return counts
    counts = np.full((world, world), rows, dtype=np.int64)
    if pattern == "mute":
        counts[case.seed % world] = 0
    elif pattern == "deaf":
        counts[:, case.seed % world] = 0
    elif pattern == "others":
        np.fill_diagonal(counts, 0)
    else:
        counts = np.diag(np.full(world, rows, dtype=np.int64))
    return counts


class _CollectiveSet(ProblemSet):
    kind: type[CollectiveProblem]

    def axes(self) -> Mapping[str, Sequence[Choice]]:
        return {
            "dtype": ("float32", "bfloat16", "float16"),
            "dims.rows": ROWS,
            "dims.width": WIDTHS,
            "layouts.x": ("contiguous", "offset"),
            "data": KINDS,
            "skew": SKEWS,
            **self.further(),
        }

    def further(self) -> Mapping[str, Sequence[Choice]]:
        """Axes of this operator alone."""
        return {}

    def ranges(self) -> Mapping[str, tuple[int, int]]:
        return {"dims.rows": (0, 70), "dims.width": (1, 140)}

    def problem(self, case: Case) -> Problem:
        return self.kind(case)


class AllReduceProblems(_CollectiveSet):
    operator = "all_reduce"
    kind = AllReduceProblem

    def further(self) -> Mapping[str, Sequence[Choice]]:
        return {"structure.scenario": SCENARIOS}

    def mend(self, axes: dict[str, Choice]) -> dict[str, Choice] | None:
        if axes["structure.scenario"] != "plain":
            # These are about which call and which rank, which only digits tell.
            axes["data"] = DIGITS
            axes["dims.rows"] = max(_integer(axes["dims.rows"]), 1)
        if axes["structure.scenario"] in FAILING:
            # Each costs a timeout and new processes, and nothing but the ranks matters: one case is enough.
            axes |= {"dtype": "float32", "dims.rows": 2, "dims.width": 5, "layouts.x": "contiguous", "skew": ()}
        return axes

    def waits(self, case: Case) -> bool:
        return case.structure["scenario"] in FAILING


class AllGatherProblems(_CollectiveSet):
    operator = "all_gather"
    kind = AllGatherProblem

    def further(self) -> Mapping[str, Sequence[Choice]]:
        return {"attributes.dim": (-1, 0, 1, 2, -2)}


class ReduceScatterProblems(_CollectiveSet):
    operator = "reduce_scatter"
    kind = ReduceScatterProblem


class AllToAllProblems(_CollectiveSet):
    operator = "all_to_all"
    kind = AllToAllProblem

    def further(self) -> Mapping[str, Sequence[Choice]]:
        return {"structure.counts": ("even", "uneven", "mute", "deaf", "others", "self")}


class BroadcastProblems(_CollectiveSet):
    operator = "broadcast"
    kind = BroadcastProblem

    def further(self) -> Mapping[str, Sequence[Choice]]:
        return {"attributes.source": (0, 1, 2, 3)}

    def mend(self, axes: dict[str, Choice]) -> dict[str, Choice] | None:
        world = max(_integer(axes.get("ranks", 1)), 1)
        axes["attributes.source"] = _integer(axes["attributes.source"]) % world
        return axes


class BarrierProblems(ProblemSet):
    operator = "barrier"

    def axes(self) -> Mapping[str, Sequence[Choice]]:
        return {"dtype": ("float32",), "skew": ((0, 20), (20, 0), (0, 0, 20), (20,), ())}

    def problem(self, case: Case) -> Problem:
        return BarrierProblem(case)


def _integer(value: Choice) -> int:
    assert isinstance(value, int)
    return value


COLLECTIVE_SETS: tuple[ProblemSet, ...] = (
    AllReduceProblems(),
    AllGatherProblems(),
    ReduceScatterProblems(),
    AllToAllProblems(),
    BroadcastProblems(),
    BarrierProblems(),
)
