"""Cases of ``gate_up_act``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
from polyaccel_conformance.problems.sgmv import WIDTHS, draw_host_adapters
from polyaccel_conformance.problems.stations import KINDS, StationProblem, mend_station, station_axes
from polyaccel_conformance.problems.weights import HostWeight

EXACT = "integers"

OPEN, SHUT = 144, -240
"""Products that silu passes on unchanged, and such that it makes zero, deltas of up to 48 included."""


class GateUpActProblem(StationProblem):
    """``silu(gate) * up``.

    ``integers``: the gate is saturated. Which of its rows are open depends on the row of x as well: its first two
    columns say which of two patterns holds.
    """

    def draw(self) -> None:
        case, k, n = self.case, self.case.dim("k"), self.case.dim("n")
        slices = (n, n)
        if case.data != EXACT:
            self.operands = {"x": self.plain(slices, k)}
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
            value = np.where(y.value == 0, 0.0, y.value)
        if self.exact:
            # exp(-144) and exp(-240) are below half a unit in the last place, or below the smallest number.
            value = np.rint(value)
        return {"y": finish(y.at(value), self.format, exact=bool(self.exact))}


class GateUpActProblems(ProblemSet):
    """Two slices of n rows."""

    operator = "gate_up_act"

    def axes(self) -> Mapping[str, Sequence[Choice]]:
        kinds = tuple(kind for kind in KINDS if kind == EXACT or kind not in EXACT_KINDS)
        return {
            **station_axes(self.operator),
            "dims.k": WIDTHS,
            "dims.n": tuple(n for n in WIDTHS if n != 129),
            "attributes.act": ("silu",),
            "data": kinds,
        }

    def ranges(self) -> Mapping[str, tuple[int, int]]:
        return {"dims.tokens": (0, 70), "dims.k": (1, 150), "dims.n": (1, 80), "dims.rank": (1, 512)}

    def mend(self, axes: dict[str, Choice]) -> dict[str, Choice] | None:
        if axes["data"] == EXACT:
            axes["structure.weight"] = "float"
            axes["structure.mix"] = "one"
        return mend_station(axes)

    def problem(self, case: Case) -> Problem:
        return GateUpActProblem(case)
