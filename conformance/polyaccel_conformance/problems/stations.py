"""Cases of ``column_linear`` and ``row_parallel_linear``, and what all stations share."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np

from polyaccel.backend import STATIONS, AdapterRows, DeviceState, StepInput
from polyaccel.backend.support import Static
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Case, Choice
from polyaccel_conformance.formats import Format, format_of
from polyaccel_conformance.harness.layouts import accepted
from polyaccel_conformance.operand import Operand
from polyaccel_conformance.oracle.bounded import Bounded, Expected, finish
from polyaccel_conformance.oracle.primitives import Order
from polyaccel_conformance.oracle.stations import Projection, column_linear
from polyaccel_conformance.problem import Exactly, Prepared, Problem, ProblemSet
from polyaccel_conformance.problems.adapters import MOST_RANK, AdaptedProblem
from polyaccel_conformance.problems.apart import token, triples
from polyaccel_conformance.problems.contraction import EXACT_KINDS, order_of
from polyaccel_conformance.problems.linear import contraction
from polyaccel_conformance.problems.sgmv import (
    MANY_ROWS,
    SLICE_FORMS,
    RowSetName,
    adapter_axes,
    digests_of,
    draw_host_adapters,
    draw_rows,
    mend_adapters,
    thin_rows,
    triples_of,
)
from polyaccel_conformance.problems.steps import adapter_rows, row_step
from polyaccel_conformance.problems.weights import tensor_of
from polyaccel_conformance.words import Source

# Their parts are asked about more sizes.
ROWS = (1, 0, 2, 7, 16, 17)
WIDTHS = (16, 1, 7, 33, 64, 129)
RANK_SIZES = (8, 1, 3, 16, 17, 64)
LARGE: tuple[Mapping[str, Choice], ...] = (
    *MANY_ROWS,
    MappingProxyType({"dims.rank": MOST_RANK, "structure.segments": "runs", "structure.ranks": "mixed"}),
    MappingProxyType({"dims.rank": MOST_RANK, "structure.segments": "each", "dtype": "bfloat16"}),
    MappingProxyType({"dims.rank": MOST_RANK, "structure.ranks": "per_slice", "dtype": "float16"}),
)
"""Cases beyond those, of every station."""

FORMS = ("float", "int4/g16", "int8/g7")

KINDS = ("normal", *EXACT_KINDS, "positive", "wide", "outliers", "ramp", "nonfinite")


class StationProblem(AdaptedProblem):
    """x, a weight with its adapters, and a step whose rows use them.

    Attributes:
        row_set: of the adapters' rows.
        weight, adapters, rows: what the station multiplies by.
    """

    row_set: RowSetName = "tokens"

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.count = case.dim("tokens")
        self.exact = case.data in EXACT_KINDS
        self._products: list[tuple[tuple[Operand, Operand | None], AdapterRows, Bounded]] = []
        if case.attributes.get("row_set") == "logits":
            self.row_set = "logits"
        self.draw()
        self.rows: AdapterRows = draw_rows(self.source, case, self.count, self.adapters)

    @abstractmethod
    def draw(self) -> None:
        """Set operands, weight and adapters."""

    @property
    def order(self) -> Order:
        return order_of(self.case.data)

    @property
    def format(self) -> Format:
        return format_of(self.case.dtype)

    def plain(self, slices: tuple[int, ...], k: int, *, ends: bool = True, most: int | None = None) -> Operand:
        """x for a weight and adapters of the case's kind of data. Where an exact product goes through further parts
        (deltas, or others unless the station ``ends`` with it), it is one that x's dtype holds: parts round it.
        ``most`` bounds it and the deltas."""
        case = self.case
        small = case.structure["segments"] != "none" or not ends
        data = "cancelling" if self.exact and small else None
        x, self.weight = contraction(
            self,
            self.count,
            k,
            slices,
            form=str(case.structure.get("weight", "float")),
            bias=bool(case.structure["bias"]),
            data=data,
            # As for sgmv: a zero rank row makes NaN of an infinity.
            infinities=False,
            most=most,
        )
        self.adapters = draw_host_adapters(self.source, case, slices, k, most=most)
        return x

    def values(self, name: str) -> np.ndarray:
        """An operand in float64."""
        return self.operands[name].values.astype(np.float64)

    def projection(self) -> Projection:
        bias = self.weight.bias
        return Projection(
            weight=self.weight.matrix.values.astype(np.float64),
            bias=None if bias is None else bias.values.astype(np.float64),
            adapters=self.adapters.oracle(),
            triples=triples_of(self.rows),
            starts=self.weight.starts,
        )

    def product(self, addend: str | None = None) -> Bounded:
        """linear (plus the operand ``addend``) and adapters, before the last rounding.

        Copies of the problem that differ in what comes after the product share it.
        """
        operands = (self.operands["x"], None if addend is None else self.operands[addend])
        for known, rows, found in self._products:
            if rows is self.rows and all(one is other for one, other in zip(known, operands, strict=True)):
                return found
        with np.errstate(invalid="ignore", over="ignore"):
            more = None if addend is None else self.values(addend)
            found = column_linear(self.values("x"), self.projection(), self.format, self.order, more)
        self._products.append((operands, self.rows, found))
        return found

    # -- placing -----------------------------------------------------------------------------------------------------

    @functools.cached_property
    def inputs(self) -> StepInput:
        """The step; where the case says so, the other row set has adapters too, for other rows."""
        others = None
        if self.case.structure["others"]:
            count = self.count if self.row_set == "logits" or self.case.structure["decode"] else min(self.count, 1)
            others = adapter_rows(Source(self.case.seed + 1), count, sorted(self.adapters.adapters), "each")
        return row_step(
            self.source,
            self.count,
            row_set=self.row_set,
            decode=bool(self.case.structure["decode"]),
            adapters=self.rows,
            others=others,
        )

    def prepared(
        self,
        bench: Bench,
        arguments: Mapping[str, object],
        static: Mapping[str, Static] = MappingProxyType({}),
    ) -> Prepared:
        """For stations whose result is ``y``."""
        weight, store = self.stored(bench)
        inputs, state = self.inputs, DeviceState(adapters=store)
        return Prepared(
            arguments={"weight": weight, "step": bench.begin_step(inputs, state), **arguments},
            collect=lambda result, _: {"y": tensor_of(result)},
            static={**self.weight.static(largest_rank=self.adapters.largest_rank), **static},
            ranges={"tokens": (self.count, max(self.count, 1))},
            token_class=inputs.token_class,
            adapters=inputs.has_adapters,
            again=lambda: {"step": bench.begin_step(inputs, state)},
        )

    @property
    def apart(self) -> Sequence[int]:
        return range(self.count)

    def alone(self, row: int) -> Problem:
        other = token(self, row)
        other.count, other.rows = 1, triples(self.rows, row)
        return other

    def digests(self) -> dict[str, str]:
        return super().digests() | self.weight.digests() | self.adapters.digests() | digests_of(self.rows)


class ColumnLinearProblem(StationProblem):
    """``y = x W^T + bias`` plus adapters of the row set."""

    def draw(self) -> None:
        case = self.case
        slices = thin_rows(case.dim("n"), str(case.structure["slices"]))
        self.operands = {"x": self.plain(slices, case.dim("k"))}

    def prepare(self, bench: Bench) -> Prepared:
        return self.prepared(bench, {"row_set": self.row_set}, {"row_set": self.row_set})

    def expected(self) -> Mapping[str, Expected | Exactly]:
        return {"y": finish(self.product(), self.format, exact=bool(self.exact))}


class RowParallelLinearProblem(ColumnLinearProblem):
    """The same on one rank, where there is nothing to sum."""

    def prepare(self, bench: Bench) -> Prepared:
        reduce = bool(self.case.attributes["reduce"])
        return self.prepared(bench, {"comm": bench.comm, "reduce": reduce}, {"reduce": reduce})


def station_axes(operator: str, dimensions: Mapping[str, int] = MappingProxyType({})) -> dict[str, Sequence[Choice]]:
    """Axes of every station; ``dimensions``: of tensor arguments that are no matrices."""
    spec = STATIONS[operator]
    layouts = {
        f"layouts.{argument.name}": accepted(argument, dimensions.get(argument.name, 2))
        for argument in spec.arguments
        if argument.kind == "tensor"
    }
    return {
        "dtype": ("float32", "bfloat16", "float16"),
        "dims.tokens": ROWS,
        **layouts,
        "structure.bias": (False, True),
        "structure.weight": FORMS,
        **adapter_axes(),
        "dims.rank": RANK_SIZES,
        "data": KINDS,
        "device": ("current", "other"),
        "stream": ("default", "side"),
    }


def mend_station(axes: dict[str, Choice], width: str = "dims.n") -> dict[str, Choice]:
    """Rules of every station."""
    if axes["data"] in EXACT_KINDS and axes.get("structure.weight", "float") != "float":
        if axes["structure.segments"] == "none":
            axes["data"] = "integers"
        else:
            # Products with codes do not cancel, so parts would round them before the deltas are added.
            axes["structure.weight"] = "float"
    return mend_adapters(axes, width=width)


class ColumnLinearProblems(ProblemSet):
    """One to three slices; rows of tokens or of logits."""

    operator = "column_linear"

    def axes(self) -> Mapping[str, Sequence[Choice]]:
        return {
            **station_axes(self.operator),
            "dims.k": WIDTHS,
            "dims.n": WIDTHS,
            "structure.slices": SLICE_FORMS,
            "attributes.row_set": ("tokens", "logits"),
        }

    def ranges(self) -> Mapping[str, tuple[int, int]]:
        return {"dims.tokens": (0, 40), "dims.k": (1, 150), "dims.n": (1, 150), "dims.rank": (1, 512)}

    def large(self) -> Sequence[Mapping[str, Choice]]:
        return LARGE

    def mend(self, axes: dict[str, Choice]) -> dict[str, Choice] | None:
        return mend_station(axes)

    def problem(self, case: Case) -> Problem:
        return ColumnLinearProblem(case)


class RowParallelLinearProblems(ColumnLinearProblems):
    """One slice, on one rank."""

    operator = "row_parallel_linear"

    def axes(self) -> Mapping[str, Sequence[Choice]]:
        return {
            **station_axes(self.operator),
            "dims.k": WIDTHS,
            "dims.n": WIDTHS,
            "structure.slices": ("one",),
            "attributes.reduce": (True, False),
        }

    def problem(self, case: Case) -> Problem:
        return RowParallelLinearProblem(case)
