"""Cases of ``linear`` on float weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from polyaccel_conformance.bench import Bench
from polyaccel_conformance.case import Case, Choice
from polyaccel_conformance.formats import format_of
from polyaccel_conformance.operand import Operand
from polyaccel_conformance.oracle.bounded import Bounded, Expected, finish
from polyaccel_conformance.oracle.primitives import add, matmul
from polyaccel_conformance.problem import Exactly, Prepared, Problem, ProblemSet
from polyaccel_conformance.problems.weights import FloatWeight, split_rows, tensor_of

# Tile edges, their neighbours, primes, and the empty sizes.
SIZES = (1, 0, 2, 7, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129)

EXACT_KINDS = ("integers", "cancelling")
KINDS = ("normal", *EXACT_KINDS, "positive", "wide", "outliers")


class LinearProblem(Problem):
    """``y = x W^T + bias``."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.exact = case.data in EXACT_KINDS
        tokens, k, n = case.dim("tokens"), case.dim("k"), case.dim("n")
        x, w = contraction(self, (tokens, k), (n, k))
        bias = None
        if case.structure["bias"]:
            values = self.source.integers("bias", (n,), -8, 8) if self.exact else self.source.normal("bias", (n,))
            bias = Operand.rounded(values, case.dtype)
        self.operands = {"x": x}
        slices = split_rows(n, str(case.structure["slices"]))
        self.weight = FloatWeight(matrix=w, bias=bias, slices=slices)

    def prepare(self, bench: Bench) -> Prepared:
        weight = self.weight.place(bench)
        case = self.case
        return Prepared(
            arguments={"weight": weight},
            collect=lambda result, _: {"y": tensor_of(result)},
            static={
                "dtype": case.dtype,
                "k": case.dim("k"),
                "slices": self.weight.slices,
                "bias": self.weight.bias is not None,
                "world_size": 1,
                "quantised": False,
                "largest_rank": 0,
            },
            ranges={"tokens": (case.dim("tokens"), max(case.dim("tokens"), 1))},
        )

    def expected(self) -> Mapping[str, Expected | Exactly]:
        x, w = self.operands["x"].values, self.weight.matrix.values
        y = matmul(Bounded.exact(x), Bounded.exact(w.T))
        if self.weight.bias is not None:
            y = add(y, Bounded.exact(self.weight.bias.values))
        return {"y": finish(y, format_of(self.case.dtype), exact=self.exact)}

    def digests(self) -> dict[str, str]:
        return super().digests() | {"weight": self.weight.matrix.digest()}


class LinearProblems(ProblemSet):
    """Float weights of one to three slices, with and without a bias."""

    operator = "linear"

    def axes(self) -> Mapping[str, Sequence[Choice]]:
        return {
            "dtype": ("float32", "bfloat16", "float16"),
            "dims.tokens": SIZES,
            "dims.k": SIZES,
            "dims.n": SIZES,
            "layouts.x": ("contiguous", "row_padded", "offset"),
            "structure.slices": ("one", "pair", "qkv", "narrow"),
            "structure.bias": (False, True),
            "data": KINDS,
            "device": ("current", "other"),
            "stream": ("default", "side"),
        }

    def ranges(self) -> Mapping[str, tuple[int, int]]:
        return {"dims.tokens": (0, 130), "dims.k": (0, 300), "dims.n": (1, 300)}

    def problem(self, case: Case) -> Problem:
        return LinearProblem(case)


def contraction(problem: Problem, a: tuple[int, int], b: tuple[int, int]) -> tuple[Operand, Operand]:
    """Two operands ``[m, k]`` and ``[n, k]`` of the case's kind of data, for a product over k.

    ``integers``: every partial sum is an integer below 2^24, so that float32 accumulation is exact in any order; the
    output rounding has ties. float32 operands need more than 11 bits, or TF32 would pass: a is 12-bit, b is -1, 0, 1.
    ``cancelling``: the second half of k nearly undoes the first, partial sums are large and the result is small.
    """
    case, source = problem.case, problem.source
    k = a[1]
    if case.data in EXACT_KINDS:
        if case.dtype == "float32":
            left, right = source.integers("a", a, -4095, 4095), source.integers("b", b, -1, 1)
        else:
            most = 64 if case.dtype == "bfloat16" else 128
            most = min(most, max(int((2**24 / max(k, 1)) ** 0.5), 1))
            left, right = source.integers("a", a, -most, most), source.integers("b", b, -most, most)
        if case.data == "cancelling" and k >= 2:
            half = k // 2
            left[:, half : 2 * half], right[:, half : 2 * half] = left[:, :half], -right[:, :half]
            right[:, 2 * half :] = 0
            extra = source.integers("extra", (a[0],), 0, max(half - 1, 0))
            left[np.arange(a[0]), half + extra] += 1
        return Operand.rounded(left, case.dtype), Operand.rounded(right, case.dtype)
    rows, columns = source.normal("a", a), source.normal("b", b)
    if case.data == "positive":
        rows, columns = np.abs(rows), np.abs(columns)
    elif case.data == "wide":
        rows = rows * 2.0 ** source.integers("scale a", (a[0], 1), -5, 5)
        columns = columns * 2.0 ** source.integers("scale b", (b[0], 1), -5, 5)
    elif case.data == "outliers" and k:
        hot = source.choose("hot", k, max(k // 64, 1))
        rows[:, hot] *= 32
    return Operand.rounded(rows, case.dtype), Operand.rounded(columns, case.dtype)
