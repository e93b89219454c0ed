"""Cases of ``gate_up_act``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from polyaccel.backend import OPERATORS
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Case, Choice
from polyaccel_conformance.operand import Operand
from polyaccel_conformance.oracle.bounded import Expected, finish
from polyaccel_conformance.oracle.stations import gate_up_act
from polyaccel_conformance.problem import Exactly, Prepared, Problem, ProblemSet
from polyaccel_conformance.problems.adapters import sparse
from polyaccel_conformance.problems.contraction import EXACT_KINDS
from polyaccel_conformance.problems.rows import coarsest
from polyaccel_conformance.problems.sgmv import draw_host_adapters
from polyaccel_conformance.problems.stations import LARGE, WIDTHS, StationProblem, mend_station, station_axes
from polyaccel_conformance.problems.weights import HostWeight

EXACT = "integers"

OPEN, SHUT = 144, -240
"""Products that silu passes on unchanged, and such that it makes zero, deltas of up to 48 included."""

MOST = 16
"""Of products and deltas of the kind ``cancelling``."""


class GateUpActProblem(StationProblem):
    """``silu(gate) * up``.

    Exact kinds saturate the gate. ``integers``: which of its rows are open depends on the row of x as well, whose first
    two columns say which of two patterns holds. ``cancelling``: the bias opens and shuts, partial sums are large.
    """

    def draw(self) -> None:
        case, k, n = self.case, self.case.dim("k"), self.case.dim("n")
        slices = (n, n)
        if case.data != EXACT:
            self.operands = {"x": self.plain(slices, k, ends=False, most=MOST)}
            if self.exact:
                shift = self.source.integers("bias", (2 * n,), -8, 8)
                shift[:n] = np.where(self.source.integers("gate", (n,), 0, 1) == 1, OPEN, SHUT)
                self.weight = replace(self.weight, bias=Operand.rounded(shift, case.dtype))
            return
        x = self.source.integers("x", (self.count, k), -2, 2).astype(np.float64)
        gate = np.zeros((n, k))
        classes = min(k, 2)
        if classes:
            x[:, :classes] = np.arange(self.count)[:, None] % classes == np.arange(classes)
            chosen = self.source.integers("gate", (n, classes), 0, 1)
            gate[:, :classes] = np.where(chosen == 1, OPEN, SHUT)
        up = sparse(self.source, n, k, (1, 2), "up")
        bias = None
        if case.structure["bias"]:
            shift = self.source.integers("bias", (2 * n,), -8, 8)
            # Without columns the gate has nothing else to open it.
            shift[:n] = 0 if classes else SHUT
            bias = Operand.rounded(shift, case.dtype)
        matrix = Operand.rounded(np.concatenate([gate, up]), case.dtype)
        self.weight = HostWeight(matrix=matrix, slices=slices, bias=bias)
        self.adapters = draw_host_adapters(self.source, case, slices, k, data="small")
        self.operands = {"x": Operand.rounded(x, case.dtype)}

    def prepare(self, bench: Bench) -> Prepared:
        act = self.case.attributes["act"]
        return self.prepared(bench, {"act": act}, {"act": str(act)})

    def expected(self) -> Mapping[str, Expected | Exactly]:
        spec = OPERATORS["silu_and_mul"]
        ulps = spec.numerics.ulps
        with np.errstate(invalid="ignore", over="ignore"):
            y = gate_up_act(
                self.product(),
                self.format,
                coarsest(spec, "silu", self.case.dtype),
                exp_ulps=ulps["exp"],
                divide_ulps=ulps["divide"],
                order=self.order,
            )
        if self.exact:
            # What is left of a shut gate is below the smallest number of every format.
            y = y.at(np.where(np.abs(y.value) < 2.0**-200, 0.0, y.value))
        return {"y": finish(y, self.format, exact=bool(self.exact))}


class GateUpActProblems(ProblemSet):
    """Two slices of n rows."""

    operator = "gate_up_act"

    def axes(self) -> Mapping[str, Sequence[Choice]]:
        return {
            **station_axes(self.operator),
            "dims.k": WIDTHS,
            "dims.n": tuple(n for n in WIDTHS if n != 129),
            "attributes.act": ("silu",),
        }

    def ranges(self) -> Mapping[str, tuple[int, int]]:
        return {"dims.tokens": (0, 40), "dims.k": (1, 150), "dims.n": (1, 80), "dims.rank": (1, 512)}

    def large(self) -> Sequence[Mapping[str, Choice]]:
        return LARGE

    def mend(self, axes: dict[str, Choice]) -> dict[str, Choice] | None:
        if axes["data"] in EXACT_KINDS:
            axes["structure.weight"] = "float"
            axes["structure.mix"] = "one"
        if axes["data"] == "cancelling":
            axes["structure.bias"] = True
        return mend_station(axes)

    def problem(self, case: Case) -> Problem:
        return GateUpActProblem(case)
