"""Cases of ``linear`` on float and quantised weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np

from polyaccel.backend import OPERATORS
from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Case, Choice
from polyaccel_conformance.formats import format_of
from polyaccel_conformance.harness.layouts import accepted
from polyaccel_conformance.operand import Operand
from polyaccel_conformance.oracle.bounded import Expected, finish
from polyaccel_conformance.oracle.gemm import linear
from polyaccel_conformance.problem import Exactly, Prepared, Problem, ProblemSet
from polyaccel_conformance.problems.contraction import (
    EXACT_KINDS,
    KINDS,
    few_large_rows,
    integer_columns,
    integer_rows,
    order_of,
    overflowing,
    random_columns,
    random_rows,
    spoil,
)
from polyaccel_conformance.problems.weights import (
    FORMS,
    SLICES,
    HostWeight,
    parse_form,
    quantised_weight,
    split_rows,
    tensor_of,
)

# Tile edges, their neighbours, primes, and the empty sizes.
SIZES = (1, 0, 2, 7, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129)

# Neither can be shaped like these kinds: a code has one sign by its zero, and few magnitudes.
_FLOAT_ONLY = ("cancelling", "overflow")


class LinearProblem(Problem):
    """``y = x W^T + bias``."""

    weight: HostWeight

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.exact = case.data in EXACT_KINDS
        self.draw()

    def draw(self) -> None:
        """Set operands and weight."""
        case = self.case
        tokens, k, n = case.dim("tokens"), case.dim("k"), case.dim("n")
        x, self.weight = contraction(
            self,
            tokens,
            k,
            split_rows(n, str(case.structure["slices"])),
            form=str(case.structure.get("weight", "float")),
            bias=bool(case.structure["bias"]),
            pieces=2 if case.structure.get("pieces") else 1,
        )
        self.operands = {"x": x}

    def prepare(self, bench: Bench) -> Prepared:
        tokens = self.case.dim("tokens")
        return Prepared(
            arguments={"weight": self.weight.place(bench)},
            collect=lambda result, _: {"y": tensor_of(result)},
            static=self.weight.static(),
            ranges={"tokens": (tokens, max(tokens, 1))},
        )

    def expected(self) -> Mapping[str, Expected | Exactly]:
        x, w, bias = self.operands["x"].values, self.weight.matrix.values, self.weight.bias
        y = linear(
            x.astype(np.float64),
            w.astype(np.float64),
            None if bias is None else bias.values.astype(np.float64),
            order_of(self.case.data),
        )
        return {"y": finish(y, format_of(self.case.dtype), exact=bool(self.exact))}

    def digests(self) -> dict[str, str]:
        return super().digests() | self.weight.digests()


class LinearProblems(ProblemSet):
    """Weights of one to three slices, float and quantised, with and without a bias, written at once or in pieces."""

    operator = "linear"

    def axes(self) -> Mapping[str, Sequence[Choice]]:
        return {
            "dtype": ("float32", "bfloat16", "float16"),
            "dims.tokens": SIZES,
            "dims.k": SIZES,
            "dims.n": SIZES,
            "layouts.x": accepted(OPERATORS["linear"].argument("x")),
            "structure.slices": SLICES,
            "structure.bias": (False, True),
            "structure.weight": FORMS,
            "structure.pieces": (False, True),
            "data": KINDS,
            "device": ("current", "other"),
            "stream": ("default", "side"),
        }

    def ranges(self) -> Mapping[str, tuple[int, int]]:
        return {"dims.tokens": (0, 130), "dims.k": (0, 300), "dims.n": (1, 300)}

    def large(self) -> Sequence[Mapping[str, Choice]]:
        longest = 16384
        sizes = (
            {"dims.tokens": 2, "dims.k": longest, "dims.n": 5},
            {"dims.tokens": longest, "dims.k": 17, "dims.n": 3},
            {"dims.tokens": 1, "dims.k": 9, "dims.n": longest},
        )
        kinds = (("float32", "integers"), ("bfloat16", "cancelling"), ("float16", "normal"))
        return tuple(
            MappingProxyType({**size, "dtype": dtype, "data": data}) for size in sizes for dtype, data in kinds
        )

    def mend(self, axes: dict[str, Choice]) -> dict[str, Choice] | None:
        if axes["data"] in _FLOAT_ONLY:
            axes["structure.weight"] = "float"
        return axes

    def problem(self, case: Case) -> Problem:
        return LinearProblem(case)


def contraction(
    problem: Problem,
    rows: int,
    k: int,
    slices: tuple[int, ...],
    *,
    form: str = "float",
    bias: bool = False,
    pieces: int = 1,
    data: str | None = None,
    infinities: bool = True,
    most: int | None = None,
) -> tuple[Operand, HostWeight]:
    """x ``[rows, k]`` and a weight of a kind of data, the case's by default; ``infinities``: besides NaN;
    ``most``: of the integers of a float weight.
    """
    case, source, n = problem.case, problem.source, sum(slices)
    dtype, data = case.dtype, case.data if data is None else data
    quantised = None
    exact = data in EXACT_KINDS
    if form != "float":
        positive = data == "positive"
        quantised = quantised_weight(source, dtype, form, n, k, exact=exact, positive=positive)
        matrix = quantised.values(dtype)
    if exact:
        if quantised is None:
            x = integer_rows(source, dtype, data, rows, k)
        else:
            x = few_large_rows(source, dtype, rows, k, 2 ** parse_form(form)[0] - 1)
        w = integer_columns(source, dtype, data, n, k, most=most) if quantised is None else np.zeros((0, 0))
        shift = source.integers("bias", (n,), -8, 8).astype(np.float64)
    else:
        x = random_rows(source, data, rows, k)
        w = random_columns(source, data, n, k) if quantised is None else np.zeros((0, 0))
        shift = source.normal("bias", (n,))
        if data == "positive":
            shift = np.abs(shift)
        elif data == "overflow":
            x, w = overflowing(x, w, dtype)
    if quantised is None:
        matrix = Operand.rounded(w, dtype)
    operand = Operand.rounded(x, dtype)
    if data == "nonfinite":
        operand = spoil(source, operand, infinities=infinities)
    weight = HostWeight(
        matrix=matrix,
        slices=slices,
        bias=Operand.rounded(shift, dtype) if bias else None,
        quantised=quantised,
        pieces=pieces,
    )
    return operand, weight
