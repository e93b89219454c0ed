"""Cases of ``row_parallel_add_norm``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from polyaccel.backend import OPERATORS
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Case, Choice
from polyaccel_conformance.operand import Operand
from polyaccel_conformance.oracle.bounded import Expected, finish
from polyaccel_conformance.oracle.stations import add_norm, column_linear
from polyaccel_conformance.problem import Exactly, Prepared, Problem, ProblemSet
from polyaccel_conformance.problems.adapters import sparse
from polyaccel_conformance.problems.contraction import EXACT_KINDS
from polyaccel_conformance.problems.rows import coarsest
from polyaccel_conformance.problems.sgmv import draw_host_adapters
from polyaccel_conformance.problems.stations import LARGE, WIDTHS, StationProblem, mend_station, station_axes
from polyaccel_conformance.problems.weights import HostWeight, tensor_of

EXACT = "integers"
EXACT_EPS = 48.0
"""With sums of +-4: 16 + 48 = 64, whose root is a power of two."""

MOST = 16
"""Of products and deltas of the kind ``cancelling``, so that the residual has room."""


class RowParallelAddNormProblem(StationProblem):
    """``(rms_norm(y + residual), y + residual)`` on one rank.

    Exact kinds: the residual makes every sum +-4, whatever the product; the weight of the norm is an integer.
    """

    def draw(self) -> None:
        case, k, n = self.case, self.case.dim("k"), self.case.dim("n")
        if case.data == EXACT:
            x = Operand.rounded(self.source.integers("x", (self.count, k), -2, 2), case.dtype)
            matrix = Operand.rounded(sparse(self.source, n, k, (1, 2), "w"), case.dtype)
            bias = None
            if case.structure["bias"]:
                bias = Operand.rounded(self.source.integers("bias", (n,), -8, 8), case.dtype)
            self.weight = HostWeight(matrix=matrix, slices=(n,), bias=bias)
            self.adapters = draw_host_adapters(self.source, case, (n,), k, data="small")
        else:
            x = self.plain((n,), k, ends=False, most=MOST)
            weight = 1 + 0.25 * self.source.normal("norm weight", (n,))
        if self.exact:
            weight = self.source.integers("norm weight", (n,), -100, 100).astype(np.float64)
        norm_weight = Operand.rounded(weight, case.dtype)
        residual = Operand.rounded(self.source.normal("residual", (self.count, n)), case.dtype)
        self.operands = {"x": x, "residual": residual, "norm_weight": norm_weight}

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        if self.exact:
            y = column_linear(self.values("x"), self.projection(), self.format, "exact").value
            sign = 1.0 - 2.0 * self.source.integers("sign", y.shape, 0, 1)
            self.operands = {**self.operands, "residual": Operand.rounded(4 * sign - y, case.dtype)}

    def prepare(self, bench: Bench) -> Prepared:
        eps = self.case.attributes["eps"]
        prepared = self.prepared(bench, {"comm": bench.comm, "eps": eps})

        def collect(result: object, _: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
            normed, total = result if isinstance(result, tuple) else (result, None)
            return {"normed": tensor_of(normed), "residual": tensor_of(total)}

        return replace(prepared, collect=collect)

    def expected(self) -> Mapping[str, Expected | Exactly]:
        spec, eps = OPERATORS["rms_norm"], self.case.attributes["eps"]
        assert isinstance(eps, float)
        with np.errstate(invalid="ignore", over="ignore"):
            residual = self.values("residual")
            normed, total = add_norm(
                self.product(),
                self.product("residual"),
                residual,
                self.values("norm_weight"),
                eps,
                self.format,
                coarsest(spec, "normed", self.case.dtype),
                spec.numerics.ulps["rsqrt"],
                self.order,
            )
            # The root is exact in 16 bits; float32 shows its ulps.
            exact = bool(self.exact) and self.case.dtype != "float32"
            return {
                "normed": finish(normed, self.format, exact=exact),
                "residual": finish(total, self.format, exact=bool(self.exact)),
            }


class RowParallelAddNormProblems(ProblemSet):
    """One slice, on one rank."""

    operator = "row_parallel_add_norm"

    def axes(self) -> Mapping[str, Sequence[Choice]]:
        return {
            **station_axes(self.operator, {"norm_weight": 1}),
            "dims.k": WIDTHS,
            "dims.n": WIDTHS,
            "attributes.eps": (1e-5, 1e-6, EXACT_EPS),
        }

    def ranges(self) -> Mapping[str, tuple[int, int]]:
        return {"dims.tokens": (0, 40), "dims.k": (1, 150), "dims.n": (1, 150), "dims.rank": (1, 512)}

    def large(self) -> Sequence[Mapping[str, Choice]]:
        return LARGE

    def mend(self, axes: dict[str, Choice]) -> dict[str, Choice] | None:
        if axes["data"] in EXACT_KINDS:
            axes["structure.weight"] = "float"
            axes["structure.mix"] = "one"
            axes["attributes.eps"] = EXACT_EPS
        return mend_station(axes)

    def problem(self, case: Case) -> Problem:
        return RowParallelAddNormProblem(case)
